"""Write the captions of composed clips: names of things, and natural wordings of what they do.

Names are Unicode's English names of emoji (emojibase) and the plain synonyms below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

SYNONYMS = {  # Unicode's name -> what people say
    "automobile": ("car",), "oncoming automobile": ("car from the front",), "sport utility vehicle": ("SUV", "jeep"),
    "locomotive": ("steam train",), "bus": ("coach",), "delivery truck": ("truck", "van"), "ambulance": ("rescue car",),
    "motor scooter": ("scooter", "moped"), "bicycle": ("bike",), "airplane": ("plane", "jet"), "small airplane": ("light aircraft",),
    "sailboat": ("boat", "yacht"), "ship": ("ocean liner",), "flying saucer": ("UFO",), "doughnut": ("donut",),
    "hamburger": ("burger",), "french fries": ("fries", "chips"), "soft ice cream": ("ice cream cone",), "hot beverage": ("cup of coffee",),
    "teacup without handle": ("cup of tea",), "beer mug": ("beer",), "clinking beer mugs": ("cheers",), "cocktail glass": ("cocktail",),
    "wine glass": ("glass of wine",), "shortcake": ("strawberry cake",), "birthday cake": ("cake with candles",), "lollipop": ("candy on a stick",),
    "pizza": ("slice of pizza",), "spaghetti": ("pasta",), "steaming bowl": ("noodle soup",), "ear of corn": ("corn",), "aubergine": ("eggplant",),
    "tangerine": ("orange fruit",), "red apple": ("apple",), "kiwi fruit": ("kiwi",), "cooking": ("fried egg in a pan",), "bacon": ("strips of bacon",),
    "dog face": ("dog", "puppy"), "cat face": ("cat", "kitten"), "mouse face": ("mouse",), "rabbit face": ("bunny",), "tiger face": ("tiger",),
    "cow face": ("cow",), "pig face": ("pig",), "monkey face": ("monkey",), "horse face": ("horse head",), "lion": ("lion face",),
    "bear": ("bear face",), "panda": ("panda bear",), "fox": ("fox face",), "frog": ("frog face",), "front-facing baby chick": ("chick",),
    "spouting whale": ("whale spouting water",), "tropical fish": ("colourful fish",), "blowfish": ("pufferfish",), "lady beetle": ("ladybug", "ladybird"),
    "honeybee": ("bee",), "spider": ("black spider",), "snake": ("serpent",), "crab": ("sea crab",), "dragon": ("green dragon",),
    "sauropod": ("long-necked dinosaur",), "T-Rex": ("tyrannosaurus", "dinosaur"), "red heart": ("heart",),
    "pile of poo": ("poop",), "jack-o-lantern": ("Halloween pumpkin",), "Christmas tree": ("decorated tree",), "evergreen tree": ("fir tree",),
    "deciduous tree": ("tree",), "sun": ("shining sun",), "sun with face": ("smiling sun",), "crescent moon": ("moon",), "star": ("yellow star",),
    "high voltage": ("lightning bolt",), "fire": ("flame",), "droplet": ("drop of water",), "snowflake": ("ice crystal",),
    "soccer ball": ("football",), "american football": ("rugby ball",), "video game": ("game controller", "gamepad"), "joystick": ("arcade stick",),
    "game die": ("dice",), "puzzle piece": ("jigsaw piece",), "wrapped gift": ("present", "gift box"), "party popper": ("confetti popper",),
    "mobile phone": ("smartphone", "phone"), "laptop": ("notebook computer",), "desktop computer": ("computer",), "television": ("TV",),
    "camera": ("photo camera",), "light bulb": ("lamp",), "alarm clock": ("clock",), "hourglass not done": ("hourglass",), "key": ("door key",),
    "hammer": ("tool hammer",), "magnifying glass tilted left": ("magnifying glass",), "money bag": ("bag of money",), "gem stone": ("diamond", "jewel"),
    "crown": ("golden crown",), "top hat": ("black hat",), "glasses": ("spectacles",), "backpack": ("school bag",), "umbrella": ("open umbrella",),
    "athletic shoe": ("sneaker", "running shoe"), "t-shirt": ("tee",), "house": ("home",), "castle": ("fairy-tale castle",),
    "robot": ("robot head",), "alien": ("grey alien",), "alien monster": ("space invader",), "ghost": ("spook",), "skull": ("death's head",),
    "clown face": ("clown",), "grinning face": ("happy face", "smiley"), "smiling face with sunglasses": ("cool face",),
    "face with tears of joy": ("laughing face",), "smiling face with heart-eyes": ("face in love",), "loudly crying face": ("crying face",),
    "enraged face": ("angry face",), "thumbs up": ("thumb pointing up",), "rocket": ("spaceship",), "pencil": ("writing pencil",),
    "musical note": ("note of music",), "guitar": ("electric guitar",), "trumpet": ("brass horn",), "violin": ("fiddle",), "bell": ("golden bell",),
}  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """Wordings of a motion: "spinning", "spins", "spin", and the single words that may stand before a noun."""

    participles: tuple[str, ...]
    singular: tuple[str, ...]
    plural: tuple[str, ...]
    adjectives: tuple[str, ...] = ()


def _directed(direction: str) -> Verb:
    to, bare = (
        (f"to the {direction}", direction)
        if direction in ("left", "right")
        else (direction, f"{direction}wards")
    )
    return Verb(
        (f"sliding {to}", f"moving {bare}", f"gliding {to}"),
        (f"slides {to}", f"moves {bare}", f"glides {to}"),
        (f"slide {to}", f"move {bare}", f"glide {to}"),
    )


VERBS = {
    "spin": Verb(("spinning", "spinning around", "rotating"), ("spins", "spins around", "rotates"), ("spin", "spin around", "rotate"), ("spinning", "rotating")),
    "flip": Verb(("flipping over", "flipping", "turning over like a coin"), ("flips over", "flips", "turns over like a coin"), ("flip over", "flip", "turn over like coins"), ("flipping",)),
    "bounce": Verb(("bouncing", "bouncing up and down", "hopping"), ("bounces", "bounces up and down", "hops"), ("bounce", "bounce up and down", "hop"), ("bouncing", "hopping")),
    "slide left": _directed("left"),
    "slide right": _directed("right"),
    "slide up": _directed("up"),
    "slide down": _directed("down"),
    "fall": Verb(("falling", "falling down", "dropping"), ("falls", "falls down", "drops"), ("fall", "fall down", "drop"), ("falling",)),
    "rise": Verb(("rising", "rising up", "taking off"), ("rises", "rises up", "takes off"), ("rise", "rise up", "take off"), ("rising",)),
    "grow": Verb(("growing", "getting bigger", "coming closer"), ("grows", "gets bigger", "comes closer"), ("grow", "get bigger", "come closer"), ("growing",)),
    "shrink": Verb(("shrinking", "getting smaller", "going away"), ("shrinks", "gets smaller", "goes away"), ("shrink", "get smaller", "go away"), ("shrinking",)),
    "shake": Verb(("shaking", "trembling", "vibrating"), ("shakes", "trembles", "vibrates"), ("shake", "tremble", "vibrate"), ("shaking", "trembling")),
    "swing": Verb(("swinging", "swinging from side to side", "swaying"), ("swings", "swings from side to side", "sways"), ("swing", "swing from side to side", "sway"), ("swinging", "swaying")),
    "fade in": Verb(("fading in", "appearing slowly", "appearing"), ("fades in", "appears slowly", "appears"), ("fade in", "appear slowly", "appear"), ("appearing",)),
    "fade out": Verb(("fading out", "disappearing slowly", "vanishing"), ("fades out", "disappears slowly", "vanishes"), ("fade out", "disappear slowly", "vanish"), ("vanishing", "disappearing")),
    "stay still": Verb(("standing still", "not moving", "staying still"), ("stands still", "does not move", "stays still"), ("stand still", "do not move", "stay still"), ("motionless", "still")),
}  # fmt: skip
NUMBERS = {1: "one", 2: "two", 3: "three"}
NOUNS = {  # Unicode's names that are no nouns -> what is seen
    "rolling on the floor laughing": "face rolling on the floor laughing", "star-struck": "star-struck face", "dizzy": "dizzy star",
    "dashing away": "cloud of dust", "collision": "explosion", "hundred points": "red 100", "cooking": "fried egg in a pan",
    "camping": "campsite", "foggy": "foggy city", "locked": "closed padlock", "unlocked": "open padlock", "locked with pen": "padlock with pen",
    "locked with key": "padlock with key", "tennis": "tennis racket", "lacrosse": "lacrosse stick", "ping pong": "ping pong paddle",
    "badminton": "badminton racket", "bowling": "bowling ball and pins", "ice hockey": "ice hockey stick", "field hockey": "field hockey stick",
    "cricket game": "cricket bat and ball", "construction": "construction barrier", "building construction": "building site",
    "high voltage": "lightning bolt", "dna": "DNA helix", "x-ray": "X-ray image", "performing arts": "theater masks", "skis": "pair of skis",
    "multiply": "multiplication sign", "divide": "division sign", "plus": "plus sign", "minus": "minus sign", "wood": "pile of wood",
    "mount fuji": "Mount Fuji", "milky way": "Milky Way", "no entry": "no entry sign", "prohibited": "prohibition sign", "wedding": "wedding chapel",
    "light rail": "light rail train", "metro": "metro train", "soap": "bar of soap", "butter": "stick of butter", "ice": "ice cube",
    "bacon": "strip of bacon", "bread": "loaf of bread", "canned food": "can of food", "cooked rice": "bowl of rice", "curry rice": "bowl of curry",
    "popcorn": "bucket of popcorn", "spaghetti": "plate of spaghetti", "luggage": "suitcase", "leafy green": "leafy vegetable", "mate": "cup of mate",
    "salt": "salt shaker", "money with wings": "flying banknotes", "garlic": "head of garlic", "yarn": "ball of yarn", "thread": "spool of thread",
    "breast-feeding": "breast-feeding woman", "horse racing": "jockey on a horse", "palms up together": "pair of open palms",
    **{label: f"{label} sign" for label in (
        "left luggage", "potable water", "non-potable water", "warning", "radioactive", "biohazard", "wireless", "copyright", "registered",
        "trade mark", "information", "currency exchange", "baggage claim", "passport control", "no smoking", "no littering",
    )},
}  # fmt: skip
_PROPER = (
    "Statue of Liberty", "ZZZ", "Tokyo tower", "Mount Fuji", "Santa Claus", "Mrs. Claus", "Mx Claus", "Milky Way", "Aries", "Taurus", "Gemini",
    "Cancer", "Leo", "Virgo", "Libra", "Scorpio", "Sagittarius", "Capricorn", "Aquarius", "Pisces", "Ophiuchus", "no ",
)  # fmt: skip
_PLURAL = ("men", "women", "people", "children", "mice", "clothes", "skis")
_SINGULAR = ("rhinoceros", "christmas", "gas", "lens", "canvas")
_IRREGULAR = {
    "person": "people", "child": "children", "mouse": "mice", "tooth": "teeth", "foot": "feet", "goose": "geese", "ox": "oxen", "die": "dice",
    "leaf": "leaves", "knife": "knives", "loaf": "loaves", "wolf": "wolves", "elf": "elves", "scarf": "scarves", "man": "men", "woman": "women",
    **{noun: noun for noun in ("sheep", "deer", "moose", "bison", "squid", "shrimp", "fish", "jellyfish", "blowfish", "sushi", "broccoli")},
}  # fmt: skip
_UNCOUNTED = re.compile(
    r"[:“”,&]|\b(and|or|not|no|button|sign|symbol|selector|input|thirty|o’clock)\b|^\W|\d"
)
_AFTER_HEAD = re.compile(
    r" (?:with|in|on|of|at|from|over|without|behind|under|low|medium|high volume|tilted|done|(?!building|ring|wing|king)\w+ing(?! face| cards| ceremony| hand))\b"
)
COLOUR_WORD = re.compile(
    r"\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|grey|gray|gold|golden|silver|rainbow)\b"
)


def names(label: str) -> tuple[str, ...]:
    """Return the names of an emoji: Unicode's, as a noun, and synonyms."""
    noun = NOUNS.get(label, label)
    if match := re.match(r"(flag|keycap|family|kiss|couple with heart|person|man|woman): (.+)", label):
        kind, rest = match.groups()
        parts = " and ".join(rest.rsplit(", ", 1))
        noun = {
            "flag": f"flag of {rest}", "keycap": f"keycap {rest}", "family": f"family of {parts}", "kiss": f"kiss of {parts}",
            "couple with heart": f"couple with heart, {parts}",
        }.get(kind) or (f"bald {kind}" if rest == "bald" else f"{kind} with {'a ' * (rest == 'beard')}{rest}")  # fmt: skip
    return tuple(dict.fromkeys((noun, *SYNONYMS.get(label, ()))))


def _split_head(noun: str) -> tuple[str, str]:
    """Split a name after the noun that has the number: "slice" and " of pizza", "man" and " climbing"."""
    match = _AFTER_HEAD.search(noun)
    return (noun[: match.start()], noun[match.start() :]) if match else (noun, "")


def is_plural(noun: str) -> bool:
    """Return whether a name is that of several things, such as "crossed swords" or "people hugging"."""
    last = _split_head(noun)[0].split(" ")[-1].lower()
    return last in _PLURAL or bool(re.search(r"[^usi]s$", last) and last not in _SINGULAR)


def with_article(noun: str) -> str:
    """Return a name with its article, if it has one."""
    if is_plural(noun) or noun.startswith(_PROPER):
        return noun
    sound = r"[aeiou](?!ni[cf]|ne[- ]|ur|we|pside)|upside|hour|honest|(?:[AEFHILMNORSX][A-Z]?|SUV|SOS|ATM)\b|X-|8|11|18"
    consonant = r"UFO|one|ewe|eu|uni"
    vowel = re.match(sound, noun if noun[:2].isupper() else noun[0].lower() + noun[1:])
    return f"{'an' if vowel and not re.match(consonant, noun) else 'a'} {noun}"


def plural(noun: str) -> str | None:
    """Return the plural of a name; None if it has no simple one."""
    head, rest = _split_head(noun)
    *words, last = head.split(" ")
    if (
        is_plural(noun)
        or noun.startswith(_PROPER)
        or _UNCOUNTED.search(noun)
        or (words and words[0] in ("man", "woman"))
    ):
        return None
    for ending, several in {
        **_IRREGULAR,
        **{word.capitalize(): other.capitalize() for word, other in _IRREGULAR.items()},
    }.items():
        if last == ending or (ending == "man" and last.endswith("man") and last not in ("shaman", "human")):
            return " ".join([*words, last[: -len(ending)] + several]) + rest
    if re.search(r"(s|x|z|ch|sh|(mang|tomat|potat|her|mosquit|volcan|tornad)o)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = f"{last[:-1]}ies"
    else:
        last += "s"
    return " ".join([*words, last]) + rest


def phrase(
    noun: str,
    rng: np.random.Generator,
    *,
    colour: str = "",
    count: int = 1,
    motion: str = "",
    bare: bool = True,
) -> str:
    """Return one of the wordings of a thing, its colour, number and motion.

    Args:
        noun: a name without an article.
        rng: chooses among wordings.
        colour: a word before the name.
        count: how many of it; more than one needs `plural(noun)`.
        motion: one of `VERBS`, or none.
        bare: whether the article may be left out.
    """
    several = count > 1 or is_plural(noun)
    base = " ".join(filter(None, (colour, (plural(noun) or noun) if count > 1 else noun)))
    whole = f"{NUMBERS[count]} {base}" if count > 1 else with_article(base)
    if bare and count == 1 and rng.random() < 0.2:
        whole = base
    if not motion:
        return whole
    verb = VERBS[motion]
    if verb.adjectives and rng.random() < 0.3:
        before = f"{rng.choice(verb.adjectives)} {base}"
        return (
            f"{NUMBERS[count]} {before}" if count > 1 else before if whole == base else with_article(before)
        )
    participle, finite = (
        str(rng.choice(forms)) for forms in (verb.participles, verb.plural if several else verb.singular)
    )
    wordings = (
        f"{whole} {participle}",
        f"{whole}, {participle}",
        f"{whole} that {finite}",
        f"{whole} {finite}",
    )
    return str(rng.choice(wordings[: 2 if whole == base and not several else 4]))


def on_background(text: str, background: str, rng: np.random.Generator) -> str:
    """Return a caption with the colour of its background."""
    if not background:
        return text
    article = with_article(background)
    endings = (
        f" on {article} background",
        f", {background} background",
        f" in front of {article} background",
    )
    return text + str(rng.choice(endings))


def relation(first: str, second: str, is_beside: bool, rng: np.random.Generator) -> str:
    """Return a wording of two things: the first on the left of the second, or above it."""
    if is_beside:
        forms = (
            f"{first} and {second}", f"{first} next to {second}", f"{first} beside {second}", f"{first} to the left of {second}",
            f"{second} to the right of {first}", f"{first} on the left and {second} on the right",
        )  # fmt: skip
    else:
        forms = (
            f"{first} above {second}",
            f"{second} below {first}",
            f"{first} over {second}",
            f"{second} under {first}",
        )
    return str(rng.choice(forms))
