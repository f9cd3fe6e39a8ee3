"""The curve of a reading as a picture: bits a byte, file after file, beside what others need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 50, 150, 20, 40
HIGHEST = 8.0
SMOOTH = 0.06  # of a mean that follows the last files


def draw(path: Path, curve: Sequence[tuple[int, float]], beside: Mapping[str, float]) -> None:
    """Write an SVG. ``curve``: the bytes of each file and the bits they took; ``beside``: bits a byte, by name."""
    total = sum(size for size, _ in curve)

    def place(done: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * done / total
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(value, HIGHEST) / HIGHEST)

    dots, line, done, mean = [], [], 0, curve[0][1] / max(1, curve[0][0])
    for size, bits in curve:
        done += size
        mean += SMOOTH * (bits / max(1, size) - mean)
        dots.append(
            '<circle cx="{:.1f}" cy="{:.1f}" r="1.6" fill="#9bb8d3"/>'.format(*place(done, bits / max(1, size)))
        )
        line.append("{:.1f},{:.1f}".format(*place(done, mean)))
    grid = []
    for value in range(0, int(HIGHEST) + 1, 2):
        x, y = place(0, value)
        grid.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#ddd"/>')
        grid.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{value}</text>')
    lowest = HEIGHT
    for name, value in sorted(beside.items(), key=lambda one: one[1]):
        x, y = place(total, value)
        lowest = min(y, lowest - 14)  # names don't stand on one another
        grid.append(f'<line x1="{LEFT}" y1="{y}" x2="{x}" y2="{y}" stroke="#c66" stroke-dasharray="2 4"/>')
        grid.append(f'<text x="{x + 6}" y="{lowest + 4}">{name} {value:.2f}</text>')
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(grid)}{"".join(dots)}'
        f'<polyline points="{" ".join(line)}" fill="none" stroke="#1f5f99" stroke-width="2"/>'
        f'<text x="{LEFT}" y="{HEIGHT - 10}">bits a byte of each file before it was learned from, over '
        f"{total / 1e6:.1f} MB</text></svg>\n",
        encoding="utf-8",
    )
