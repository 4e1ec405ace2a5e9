"""The command that draws the emoji sets that the embedded model is trained from: SVG files of npm packages to PNG.

    mkdir npm && cd npm
    for set in noto noto-v1 fluent-emoji fluent-emoji-flat fluent-emoji-high-contrast fxemoji emojione \\
      streamline-emojis twemoji openmoji; do npm pack @iconify-json/$set; done
    pip install resvg-py
    python configs/tiny_sets.py npm runs/tiny/sets

It writes SET/CODE.png, 128 x 128 with transparency, for each set in SETS, and ATTRIBUTION.md. CODE is the emoji's code
points without fe0f, as in `1f3c3-200d-2640`. Emoji with a skin tone, flags of countries, letters and most signs are
left out. A file that is there already is not drawn again. configs/tiny_data.py makes the training data.

Twemoji and OpenMoji are drawn too, for the measures only: they stay unseen, so that the model can be taught them.
"""

import io
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command

SIDE = 128
"""Pixels of a side: twice the model's pictures, so that a subject may be turned and shrunk."""


class EmojiSet(NamedTuple):
    """A set of emoji. word: what captions call its style. package: of npm, after `@iconify-json/`."""

    word: str
    package: str
    version: str
    licence: str
    credit: str


SETS = (
    EmojiSet("noto", "noto", "1.2.9", "Apache-2.0", "Noto emoji, copyright Google"),
    EmojiSet("blob", "noto-v1", "1.2.5", "Apache-2.0", "Noto emoji of 2017 (the blobs), copyright Google"),
    EmojiSet("fluent", "fluent-emoji", "1.2.7", "MIT", "Fluent emoji, copyright Microsoft"),
    EmojiSet("flat", "fluent-emoji-flat", "1.2.6", "MIT", "Fluent emoji, flat, copyright Microsoft"),
    EmojiSet("glyph", "fluent-emoji-high-contrast", "1.2.6", "MIT", "Fluent emoji, high contrast, copyright Microsoft"),
    EmojiSet("firefox", "fxemoji", "1.2.2", "Apache-2.0", "FxEmojis, copyright Mozilla"),
    EmojiSet("emojitwo", "emojione", "1.2.3", "CC-BY-4.0", "EmojiTwo, by its contributors, from Emoji One 2.2"),
    EmojiSet("sticker", "streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline emojis, by Webalys"),
)
TAUGHT = (
    EmojiSet("twemoji", "twemoji", "1.2.5", "CC-BY-4.0", "Twemoji, copyright Twitter and other contributors"),
    EmojiSet("openmoji", "openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji, by its contributors"),
)
"""Sets that the model never sees. The measures teach it their styles."""

OWN_NAMES: dict[str, dict[str, str]] = {
    "firefox": {
        "2hearts": "two hearts", "grin": "grinning face with big eyes", "grineyes": "beaming face with smiling eyes",
        "grinsquint": "grinning squinting face", "grinsweat": "grinning face with sweat",
        "grintears": "face with tears of joy", "grinwide": "grinning face",
        "grinwideeyes": "grinning face with smiling eyes", "smallsmile": "slightly smiling face",
        "smallfrown": "frowning face", "crying": "crying face", "loudlycrying": "loudly crying face",
        "angry": "enraged face", "sleepy": "sleepy face", "medicalmask": "face with medical mask",
        "openmouth": "face with open mouth", "kissing": "face blowing a kiss", "kisseyes": "kissing face",
        "kissclosedeyes": "kissing face with closed eyes", "tongueout": "face with tongue",
        "tongueoutwink": "winking face with tongue", "tongueoutwink2": "squinting face with tongue",
        "smiletongue": "face savoring food", "smirk": "smirking face", "sunglasses": "smiling face with sunglasses",
        "darksunglasses": "sunglasses", "devilhorns": "smiling face with horns", "imp": "angry face with horns",
        "halo": "smiling face with halo", "hearteyes": "smiling face with heart-eyes", "neutral": "neutral face",
        "nomouth": "face without mouth", "expressionless": "expressionless face", "unamused": "unamused face",
        "sleeping": "sleeping face", "astonished": "", "flushed": "flushed face",
        "weary": "weary face", "screamfear": "face screaming in fear", "triumph": "face with steam from nose",
        "worried": "worried face", "confused": "confused face", "fearful": "fearful face",
        "winking": "winking face", "pensive": "pensive face", "tired": "tired face", "ogre": "ogre",
        "poo": "pile of poo", "foxsmiling": "fox", "dizzyface": "face with crossed-out eyes",
        "bunny": "rabbit face", "bunnyside": "rabbit", "cat": "cat face", "catside": "cat", "dog": "dog face",
        "dogside": "dog", "mouse": "mouse face", "mouseside": "mouse", "pig": "pig face", "pigside": "pig",
        "tiger": "tiger face", "tigerside": "tiger", "dragonhead": "dragon face", "dragonside": "dragon",
        "monkeyhear": "hear-no-evil monkey", "monkeysee": "see-no-evil monkey", "monkeyspeak": "speak-no-evil monkey",
        "pandaface": "panda", "wolfface": "wolf", "hampster": "hamster", "frontfacingchick": "front-facing baby chick",
        "spurtingwhale": "spouting whale", "sheep": "ewe", "pigsnout": "pig nose", "horse": "horse",
        "heartarrow": "heart with arrow", "heartribbon": "heart with ribbon", "brokenheart": "broken heart",
        "heartblue": "", "heartgreen": "green heart", "heartpurple": "purple heart",
        "heartyellow": "yellow heart", "kissmark": "kiss mark", "largebluecircle": "blue circle",
        "largeredcircle": "red circle", "blacklargesquare": "black large square",
        "mediumblackcircle": "black circle", "bolt": "high voltage", "gem": "gem stone",
        "present": "wrapped gift", "evergreen": "evergreen tree", "deciduoustree": "deciduous tree",
        "chilipepper": "hot pepper", "earofmaize": "ear of corn", "aubergine": "eggplant",
        "frenchfries": "french fries",
        "sliceofpizza": "pizza", "umbrella": "closed umbrella", "umbrellawithraindrops": "umbrella with rain drops",
        "mansshirt": "t-shirt", "mensshoe": "man's shoe", "boot": "woman's boot", "heels": "high-heeled shoe",
        "schoolsatchel": "backpack", "cellphone": "mobile phone", "soccerball": "soccer ball",
        "housebuilding": "house", "racecar": "racing car", "openlock": "unlocked", "lock": "locked",
        "headphone": "headphone", "wineglass": "wine glass", "beermug": "beer mug", "potoffood": "pot of food",
        "snowmanwithoutsnow": "snowman without snow", "fistedhand": "oncoming fist", "thumbsup": "thumbs up",
        "thumbsdown": "thumbs down", "victoryhand": "victory hand", "wave": "water wave", "waving": "waving hand",
        "clap": "clapping hands", "flexbicep": "flexed biceps", "whitemediumstar": "", "star": "glowing star",
        "fatherchristmas": "santa claus", "cop": "police officer", "policecar": "police car",
        "honeypot": "honey pot", "kiss": "", "birthdaycake": "birthday cake", "dizzy": "dizzy", "book": "",
        "studiomic": "studio microphone", "ship": "ship", "highspeedtrain": "high-speed train",
        "steamlocomotive": "locomotive", "fireengine": "fire engine", "deliverytruck": "delivery truck",
        "alarmclock": "alarm clock", "electrictorch": "flashlight", "blackscissors": "scissors",
        "artistpalette": "artist palette", "eyes": "eyes", "clapperboard": "clapper board",
        "directhit": "bullseye", "videogame": "video game", "gamedie": "game die", "moneybag": "money bag",
        "crossmark": "cross mark", "rainbow": "",
    },
}  # fmt: skip
"""Set -> its own name of a picture -> CLDR's name, or nothing for a picture that shows something else."""


def draw_sets(packages: str | Path, folder: str | Path, render: Callable[[str], bytes]) -> dict[str, int]:
    """Draws all sets. Returns the number of pictures of each. render: makes a PNG of an SVG document."""
    chars = read_package(packages, SETS[0], "chars")
    codes = {code.replace("-fe0f", ""): slug for code, slug in chars.items() if is_drawn(slug, code)}
    counts = {}
    for emoji_set in (*SETS, *TAUGHT):
        out = Path(folder) / emoji_set.word
        out.mkdir(parents=True, exist_ok=True)
        found = dict(matched(emoji_set.word, read_package(packages, emoji_set, "icons"), codes))
        for code, svg in found.items():
            path = out / f"{code}.png"
            if not path.exists():
                path.write_bytes(render(svg))
        counts[emoji_set.word] = len(found)
    (Path(folder) / "ATTRIBUTION.md").write_text(attribution(), "utf-8")
    return counts


def attribution() -> str:
    """The table of the sets with their licences, in Markdown."""
    rows = [f"| {s.word} | {s.credit} | {s.licence} | `@iconify-json/{s.package}` {s.version} |" for s in SETS]
    return "\n".join(["| word | pictures | licence | npm package |", "|---|---|---|---|", *rows, ""])


def read_package(packages: str | Path, emoji_set: EmojiSet, part: str) -> dict[str, Any]:
    """The JSON file `part` of a set's package, an archive in the folder `packages`."""
    path = Path(packages) / f"iconify-json-{emoji_set.package}-{emoji_set.version}.tgz"
    try:
        with tarfile.open(path) as archive:
            return json.load(archive.extractfile(f"package/{part}.json"))  # pyright: ignore
    except (OSError, KeyError, tarfile.TarError) as error:
        raise DataError(
            f"{path}: `npm pack @iconify-json/{emoji_set.package}@{emoji_set.version}` makes this archive: {error}"
        ) from error


def is_drawn(slug: str, code: str) -> bool:
    """Whether an emoji is one thing to draw: no skin tone, flag of a country, keycap, letter, clock face or sign."""
    if re.search("1f3f[b-f]", code) or code.startswith(("1f1", "e0")) or "20e3" in code:
        return False
    signs = r"button|o-clock|thirty$|^flag-|input-|squared|keycap|(?<!with)(?<!and)-arrow$|japanese-|-hair|^\w$"
    return not re.search(signs, slug) or slug in ("check-mark-button", "right-arrow")


def matched(word: str, icons: Mapping[str, Any], codes: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields code and SVG of the pictures of a set. codes: code -> CLDR's name of it, as in `cat-face`."""
    own = OWN_NAMES.get(word, {})
    bodies: dict[str, str] = {}
    names = {**{name: name for name in icons["icons"]}, **{a: v["parent"] for a, v in icons.get("aliases", {}).items()}}
    for name, parent in sorted(names.items()):
        if parent in icons["icons"]:
            bodies.setdefault(_plain(own.get(name, re.sub(r"-\d$", "", name))), parent)
    slugs = set(codes.values())
    for code, slug in sorted(codes.items()):
        older = [slug.replace("cat", "cat-face", 1)] if "cat" in slug.split("-") else [f"{slug}-face"]
        tried = [slug, *(name for name in older if name not in slugs)]  # CLDR's names of 2018 had "face" in more places
        parent = next((bodies[_plain(name)] for name in tried if _plain(name) in bodies), None)
        if parent is not None:
            yield code, _document(icons, parent)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _document(icons: Mapping[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>'


def render(svg: str) -> bytes:
    """The PNG of an SVG document, SIDE pixels wide."""
    try:
        import resvg_py  # pyright: ignore
    except ImportError as error:
        raise ConfigError("drawing SVG needs resvg-py: pip install resvg-py") from error
    from PIL import Image

    data = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    out = io.BytesIO()
    square.save(out, "PNG")
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    parser = command.Parser(prog="python configs/tiny_sets.py", description="Draw the emoji sets of npm packages.")
    parser.add_argument("packages", help="folder of the archives that npm pack made")
    parser.add_argument("folder", help="folder for the pictures")
    args = parser.parse_args(argv)
    counts = draw_sets(args.packages, args.folder, render)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
