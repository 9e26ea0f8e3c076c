"""vLLM's processes, by the names it gives them."""

from pathlib import Path


def descendants(parent: int, title: str) -> list[int]:
    """Of a process, those whose name begins so; the kernel keeps 15 characters of it."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue  # it has just ended
        pid = int(folder.name)
        names[pid] = name
        children.setdefault(int(rest.split()[1]), []).append(pid)
    found, left = [], [parent]
    while left:
        pid = left.pop()
        left += children.get(pid, [])
        found += [pid] if names.get(pid, "").startswith(title) else []
    return found


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
