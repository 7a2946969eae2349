"""Draws which room of the house imports which: `python docs/rooms.py` for the code as it is, with a revision for both.

    python docs/rooms.py 1fce58a        docs/rooms.svg: that revision at the left, the working tree at the right

A row is a room, lowest floor first, and a filled cell is an import from the room of that column; the darker, the more
names. Below the diagonal imports go down. A room is a file or a folder of moesaic/. Leaves out imports within a room.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CELL, LABEL, GAP, TOP = 13, 86, 40, 122  # pixels
INK, PAPER, GRID, DOWN, UP = "#24292f", "#ffffff", "#eaeef2", "#0a58ca", "#c9252d"


@dataclass(frozen=True)
class House:
    """Rooms, lowest floor first, and how many names one imports from another."""

    rooms: Sequence[str]
    arrows: Mapping[tuple[str, str], int]

    @staticmethod
    def of(files: Mapping[str, str]) -> "House":
        """Of a package's files: path below moesaic/ -> text."""
        found: Counter[tuple[str, str]] = Counter()
        for path, text in files.items():
            here = path.split("/")[0].removesuffix(".py")
            for module in imported(path, text):
                if (there := module.split(".")[0]) != here:
                    found[here, there] += 1
        rooms = floors(files["__init__.py"])
        of_rooms = {pair: count for pair, count in found.items() if set(pair) <= set(rooms)}
        return House(rooms, of_rooms)


def floors(text: str) -> list[str]:
    """The rooms that moesaic/__init__.py lists, which stood together on floors once."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "FLOORS":
            listed = ast.literal_eval(node.value)
            return [room for floor in listed for room in ([floor] if isinstance(floor, str) else floor)]
    raise SystemExit("moesaic/__init__.py lists no FLOORS; name a revision that has them")


def imported(path: str, text: str) -> list[str]:
    """What a file imports of the package, one entry a name, relative to moesaic."""
    package, found = path.split("/")[:-1], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "moesaic"):
            base = package[: len(package) + 1 - node.level] if node.level else []
            said = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
            base = [part for part in [*base, *said] if part]
            found += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name.removeprefix("moesaic.") for a in node.names if a.name.startswith("moesaic.")]
    return found


def working_tree() -> dict[str, str]:
    return {p.relative_to(ROOT / "moesaic").as_posix(): p.read_text() for p in (ROOT / "moesaic").rglob("*.py")}


def revision(name: str) -> dict[str, str]:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout

    listed = git("ls-tree", "-r", "--name-only", name, "moesaic/").splitlines()
    return {p.removeprefix("moesaic/"): git("show", f"{name}:{p}") for p in listed if p.endswith(".py")}


def drawn(house: House, x: int, title: str) -> list[str]:
    """The matrix of one house as SVG elements, its left edge at `x`."""
    left, size = x + LABEL, CELL * len(house.rooms)
    up = sum(house.rooms.index(b) > house.rooms.index(a) for a, b in house.arrows)
    counts = f"{len(house.rooms)} rooms, {len(house.arrows)} arrows" + (f", {up} upward" if up else "")
    found = [
        f'<text x="{left}" y="18" font-size="14" font-weight="600">{title}</text>',
        f'<text x="{left}" y="36" font-size="12">{counts}</text>',
    ]
    for i, room in enumerate(house.rooms):
        middle = TOP + CELL * i + 10
        found.append(f'<text x="{left - 6}" y="{middle}" text-anchor="end">{room}</text>')
        at = left + CELL * i + 9
        found.append(f'<text x="{at}" y="{TOP - 6}" transform="rotate(-60 {at} {TOP - 6})">{room}</text>')
        for line in (
            (left, TOP + CELL * i, left + size, TOP + CELL * i),
            (left + CELL * i, TOP, left + CELL * i, TOP + size),
        ):
            found.append('<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="{}"/>'.format(*line, GRID))
        found.append(cell(left, i, i, GRID, 1))
    for (here, there), names in house.arrows.items():
        row, column = house.rooms.index(here), house.rooms.index(there)
        shade = 0.35 if names < 3 else 0.65 if names < 10 else 1
        found.append(cell(left, row, column, DOWN if column < row else UP, shade))
    return found


def cell(left: int, row: int, column: int, color: str, opacity: float) -> str:
    x, y, side = left + CELL * column + 1, TOP + CELL * row + 1, CELL - 2
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{color}" fill-opacity="{opacity}"/>'


def picture(houses: Mapping[str, House]) -> str:
    """Houses by their titles, side by side, as one SVG."""
    body, x = list[str](), 10
    for title, house in houses.items():
        body += drawn(house, x, title)
        x += LABEL + CELL * len(house.rooms) + GAP + 30  # the last label leans out
    height = TOP + CELL * max(len(house.rooms) for house in houses.values()) + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{height}" viewBox="0 0 {x} {height}"'
    style = f'font-family="Inter, Helvetica Neue, Arial, sans-serif" font-size="10.5" fill="{INK}"'
    ground = f'<rect width="{x}" height="{height}" fill="{PAPER}"/>'
    return "\n".join([f"{head} {style}>", ground, *body, "</svg>"]) + "\n"


def main() -> None:
    houses = {f"before ({name})": House.of(revision(name)) for name in sys.argv[1:]}
    houses["now"] = House.of(working_tree())
    (ROOT / "docs" / "rooms.svg").write_text(picture(houses))
    for title, house in houses.items():
        print(f"{title}: {len(house.rooms)} rooms, {len(house.arrows)} arrows")


if __name__ == "__main__":
    main()
