"""A plain ZeroMQ socket in an event loop.

`zmq.asyncio` makes a future, a task step and several calls into ZeroMQ of every message, about 100 microseconds on one
core; here one call takes all messages that are there.
"""

import asyncio
from collections.abc import Callable
from typing import cast

import zmq


class Watched:
    """Calls a function whenever a socket may have something to be read, or room for something to be sent.

    ZeroMQ's descriptor tells of changes only, and sending or receiving uses up what it tells: the function has to go on
    until nothing can be read and nothing is left that could be sent, or to say that there may be more.
    """

    def __init__(self, socket: zmq.Socket, turn: Callable[[], bool]) -> None:
        """
        Args:
            turn: called in the loop's thread, to do a bounded amount; whether there may be more to do. It is called
                again then, after others in the loop had their turn.
        """
        self.socket = socket
        self._turn = turn
        self._ended: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Until cancelled; raises what `turn` raises."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        loop.add_reader(self.socket.FD, self.turn)
        self.turn()  # what is there already, the descriptor does not tell
        try:
            await self._ended
        finally:
            self._ended.cancel()
            loop.remove_reader(self.socket.FD)

    def turn(self) -> None:
        """One call now. In the loop's thread; nothing happens while `run` does not."""
        if self._ended is None or self._ended.done():
            return
        try:
            more = self._turn()
        except Exception as error:
            self._ended.set_exception(error)
            return
        if more:
            self._ended.get_loop().call_soon(self.turn)


def received(socket: zmq.Socket) -> list[bytes] | None:
    """The next message's frames; None when there is none."""
    try:
        return socket.recv_multipart(zmq.DONTWAIT)
    except zmq.Again:
        return None


def possible(socket: zmq.Socket) -> int:
    """What can be done now: `zmq.POLLIN`, `zmq.POLLOUT`, both or neither."""
    return cast(int, socket.getsockopt(zmq.EVENTS))
