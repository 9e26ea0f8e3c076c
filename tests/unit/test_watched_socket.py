"""ZeroMQ's descriptor tells of changes only: nothing may be left lying because somebody else used a change up."""

import asyncio
import threading
import time

import pytest
import zmq

from pipeline.transport.watched import Watched, received


@pytest.fixture
def pair(request):
    """A ROUTER and a connected DEALER that hold four messages each way, besides the kernel."""
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    router.router_mandatory = True  # waits for room instead of dropping
    for socket in (router, dealer):
        socket.set_hwm(4)
        socket.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealer.connect(f"tcp://127.0.0.1:{port}")
    yield router, dealer
    context.destroy(linger=0)


def test_everything_arrives_however_sending_and_receiving_meet(pair):
    router, dealer = pair
    count, size = 400, 50_000
    sent = got = 0

    def exchange() -> bool:
        nonlocal sent, got
        while sent < count:
            try:
                dealer.send(b"%07d" % sent + bytes(size), zmq.DONTWAIT)
            except zmq.Again:
                break
            sent += 1
        for _ in range(3):
            if (frames := received(dealer)) is None:
                break
            assert frames[0][:7] == b"%07d" % got
            got += 1
        events = dealer.EVENTS
        return bool(events & zmq.POLLIN or (sent < count and events & zmq.POLLOUT))

    def echo() -> None:
        for turn in range(count):
            router.send_multipart(router.recv_multipart())
            if turn % 50 == 0:
                time.sleep(0.01)

    async def main() -> None:
        watching = asyncio.ensure_future(Watched(dealer, exchange).run())
        deadline = time.monotonic() + 30
        while got < count and time.monotonic() < deadline and not watching.done():
            await asyncio.sleep(0.005)
        watching.cancel()

    answering = threading.Thread(target=echo, daemon=True)
    answering.start()
    asyncio.run(main())
    assert (sent, got) == (count, count)


def test_messages_from_before_are_seen_and_more_than_a_turn_takes(pair):
    router, dealer = pair
    for number in range(4):
        dealer.send(b"%d" % number)
    seen = []

    def one() -> bool:
        if (frames := received(router)) is not None:
            seen.append(frames[1])
        return bool(router.EVENTS & zmq.POLLIN)

    async def main() -> None:
        router.poll(5000)
        await asyncio.sleep(0.1)
        watching = asyncio.ensure_future(Watched(router, one).run())
        await asyncio.sleep(0.2)
        watching.cancel()

    asyncio.run(main())
    assert seen == [b"0", b"1", b"2", b"3"]


def test_what_a_turn_raises_ends_it_and_no_turn_follows(pair):
    calls = 0

    def broken() -> bool:
        nonlocal calls
        calls += 1
        raise OSError("disk")

    async def main() -> None:
        watched = Watched(pair[1], broken)
        with pytest.raises(OSError, match="disk"):
            await watched.run()
        watched.turn()

    asyncio.run(main())
    assert calls == 1


def test_after_it_is_cancelled_nothing_is_called(pair):
    calls = 0

    def count() -> bool:
        nonlocal calls
        calls += 1
        return False

    async def main() -> None:
        watched = Watched(pair[1], count)
        watched.turn()
        assert not calls, "before it runs, too"
        watching = asyncio.ensure_future(watched.run())
        await asyncio.sleep(0.05)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        before = calls
        watched.turn()
        assert calls == before > 0

    asyncio.run(main())
