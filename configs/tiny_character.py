"""The command that draws plana, the character that the examples teach the embedded model: six poses, 128 x 128.

    pip install resvg-py
    python configs/tiny_character.py sdjax/tiny/plana

It writes NAME.svg and NAME.png for each pose. Plana is ours: a pink cat with a blue cap, in the flat style of the
sample pictures. The embedded model knows cats, pink things and caps, and was never shown the three together.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tiny_sets

from sdjax.runtime import command

FUR, INNER, DARK, CAP, PEAK, MOUTH = "#f4a6c8", "#e0699f", "#3b2640", "#4289d9", "#2c65ad", "#c33c6e"

_LEFT_EYE = '<ellipse cx="13" cy="21" rx="1.9" ry="2.5"/>'
EYES = {
    "open": f'{_LEFT_EYE}<ellipse cx="23" cy="21" rx="1.9" ry="2.5"/>',
    "closed": '<path d="M10.8 21.4q2.2 2 4.4 0M20.8 21.4q2.2 2 4.4 0" fill="none" stroke-width="1.1"/>',
    "wink": f'{_LEFT_EYE}<path d="M20.8 21.4q2.2-2.4 4.4 0" fill="none" stroke-width="1.1"/>',
    "up": '<ellipse cx="13.6" cy="20" rx="1.9" ry="2.5"/><ellipse cx="23.6" cy="20" rx="1.9" ry="2.5"/>',
    "wide": '<circle cx="13" cy="21" r="2.7"/><circle cx="23" cy="21" r="2.7"/>',
}
MOUTHS = {
    "smile": '<path d="M15 26.4q1.5 2 3 0q1.5 2 3 0" fill="none" stroke-width="0.9"/>',
    "laugh": f'<path d="M14.5 26.4h7q-.6 4.4-3.5 4.4t-3.5-4.4z" fill="{MOUTH}" stroke-width="0.6"/>',
    "small": f'<ellipse cx="18" cy="28" rx="1.5" ry="1.9" fill="{MOUTH}" stroke="none"/>',
}


class Pose(NamedTuple):
    """A pose of the character. turn: clockwise, in degrees."""

    name: str
    eyes: str
    mouth: str
    turn: float = 0
    mirrored: bool = False


POSES = (
    Pose("plain", "open", "smile"),
    Pose("laughing", "open", "laugh", -8),
    Pose("winking", "wink", "smile", 8),
    Pose("sleeping", "closed", "small", 10, mirrored=True),
    Pose("looking-up", "up", "smile", -6, mirrored=True),
    Pose("surprised", "wide", "small"),
)


def svg(pose: Pose) -> str:
    """The drawing of a pose, in a square of 36."""
    mirror = "translate(36 0) scale(-1 1) " if pose.mirrored else ""
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">
<g transform="{mirror}rotate({pose.turn:g} 18 20)">
<path d="M4 20V6.5q0-2 1.8-.9L13 10zM32 20V6.5q0-2-1.8-.9L23 10z" fill="{FUR}"/>
<path d="M6 14V8.6q0-1 1-.4l4 2.6zM30 14V8.6q0-1-1-.4l-4 2.6z" fill="{INNER}"/>
<ellipse cx="18" cy="22" rx="15" ry="12.2" fill="{FUR}"/>
<ellipse cx="18" cy="27.4" rx="7" ry="5" fill="#fbd5e5"/>
<g fill="{DARK}" stroke="{DARK}" stroke-linecap="round">
<g stroke-width="0">{EYES[pose.eyes]}</g>
<path d="M2.5 23.5l6 1M2.8 28l5.8-1.4M33.5 23.5l-6 1M33.2 28l-5.8-1.4" fill="none" stroke-width=".8"/>
{MOUTHS[pose.mouth]}
</g>
<path d="M16.4 24h3.2q.5 0 .1.5l-1.3 1.4q-.4.4-.8 0l-1.3-1.4q-.4-.5.1-.5z" fill="{MOUTH}"/>
<path d="M8 14.6Q8.6 4 18 4t10 10.6q-10-2.4-20 0z" fill="{CAP}"/>
<path d="M7.4 14.2Q18 10.8 28.6 14.2q6 1.8 5.6 3.4-.3 1.2-3 .7-13-2.6-23.4-1.3-1.6.1-1.4-1.1z" fill="{PEAK}"/>
<circle cx="18" cy="4.2" r="1.3" fill="{PEAK}"/>
</g>
</svg>
"""


def _run(argv: Sequence[str]) -> None:
    parser = command.Parser(prog="python configs/tiny_character.py", description="Draw the character of the examples.")
    parser.add_argument("folder")
    folder = Path(parser.parse_args(argv).folder)
    folder.mkdir(parents=True, exist_ok=True)
    for pose in POSES:
        (folder / f"{pose.name}.svg").write_text(svg(pose), "utf-8")
        (folder / f"{pose.name}.png").write_bytes(tiny_sets.render(svg(pose)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
