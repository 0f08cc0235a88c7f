"""The material of the demo's small world: its names, its facts, and the words of stories and questions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A fact about every subject of a kind. {n} stands for the subject and {v} for the value.

    Attributes:
        told: sentences of the world's stories.
        asked: questions; what follows a line break is the input that comes with an instruction.
        values: what can be true; the wrong answers of a question are drawn from them.
    """

    told: tuple[str, ...]
    asked: tuple[str, ...]
    values: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """Return the words of `text`."""
    return tuple(text.split())


DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WOMEN = words(
    "Ada Alma Anna Bela Clara Cora Dora Edda Ella Emma Fanny Flora Greta Hanna Ida Ines Irma Julia Karla Lena Lotte "
    "Mara Mina Nora Olga Paula Rosa Sara Tilda Vera"
)
MEN = words(
    "Adam Anton Arno Ben Bruno Carl David Egon Emil Felix Fritz Georg Hugo Ivan Jakob Jonas Karl Leo Lukas Max Moritz "
    "Nils Oskar Otto Paul Peter Rolf Simon Theo Tom"
)

# Name: home, food, colour, voice, and when it is awake.
ANIMALS = {
    "fox": "forest mice red sharp night",
    "owl": "forest mice brown deep night",
    "bear": "cave berries brown deep day",
    "wolf": "cave rabbits grey deep night",
    "deer": "forest grass brown soft day",
    "mole": "meadow worms black soft night",
    "badger": "forest worms grey rough night",
    "hare": "meadow grass brown soft day",
    "stork": "meadow frogs white rough day",
    "crow": "field seeds black rough day",
    "robin": "garden worms red clear day",
    "finch": "garden seeds green clear day",
    "lark": "field seeds brown clear day",
    "dove": "garden seeds white soft day",
    "frog": "pond flies green deep night",
    "toad": "garden flies brown deep night",
    "newt": "pond worms black soft night",
    "swan": "pond plants white rough day",
    "heron": "river fish grey sharp day",
    "otter": "river fish brown sharp day",
    "beaver": "river plants brown soft night",
    "trout": "river flies grey soft day",
    "bat": "cave flies black sharp night",
    "lizard": "meadow flies green soft day",
    "squirrel": "forest nuts red sharp day",
    "marten": "forest berries brown sharp night",
    "thrush": "garden berries grey clear day",
    "pike": "pond fish green soft night",
    "shrew": "field worms grey sharp night",
    "kite": "field mice red sharp day",
    "goose": "pond grass grey rough day",
    "raven": "forest frogs black rough day",
}

# Name: what it is made of. The prices are drawn.
GOODS = {
    "lamp": "glass",
    "bowl": "clay",
    "cup": "clay",
    "jug": "clay",
    "vase": "glass",
    "mirror": "glass",
    "bottle": "glass",
    "spoon": "wood",
    "chair": "wood",
    "table": "wood",
    "ladder": "wood",
    "basket": "straw",
    "broom": "straw",
    "mat": "straw",
    "kettle": "iron",
    "pan": "iron",
    "nail": "iron",
    "key": "iron",
    "knife": "iron",
    "hammer": "iron",
    "blanket": "wool",
    "coat": "wool",
    "scarf": "wool",
    "carpet": "wool",
    "belt": "leather",
    "bag": "leather",
    "saddle": "leather",
    "purse": "leather",
    "comb": "wood",
    "pot": "clay",
}


VILLAGER = {
    "job": Relation(
        (
            "{n} is a {v}.",
            "{n} works as a {v}.",
            "{n} has the job of a {v}.",
            "All day long {n} works as a {v}.",
            "The whole village knows {n} as a good {v}.",
            "{n} is a {v} and likes the work.",
        ),
        ("What is the job of {n}?", "What does {n} work as?", "Name the job of this person.\n{n}"),
        words("baker miller tailor fisher weaver potter smith farmer teacher doctor painter shepherd"),
    ),
    "home": Relation(
        (
            "{n} lives by the {v}.",
            "The house of {n} stands by the {v}.",
            "{n} has a small house by the {v}.",
            "In the evening {n} walks home to the {v}.",
            "The home of {n} is by the {v}.",
            "{n} sleeps in a little house by the {v}.",
        ),
        ("By what does {n} live?", "What does the house of {n} stand by?", "Name the home of this person.\n{n}"),
        words("river harbour bridge well church forest lighthouse market hill pond mill orchard"),
    ),
    "pet": Relation(
        (
            "{n} goes for a walk with a {v}.",
            "The pet of {n} is a {v}.",
            "{n} feeds a {v} every morning.",
            "{n} takes good care of a {v}.",
            "At home {n} keeps a {v}.",
            "{n} has a pet, and it is a {v}.",
        ),
        ("Which pet does {n} have?", "What is the pet of {n}?", "Name the pet of this person.\n{n}"),
        words("cat dog goat hen rabbit pony parrot turtle duck mouse snail lamb"),
    ),
    "food": Relation(
        (
            "{n} likes {v} best.",
            "The favourite food of {n} is {v}.",
            "At noon {n} eats {v}.",
            "{n} often asks for {v}.",
            "{n} is always glad to eat {v}.",
            "On a holiday {n} eats a lot of {v}.",
        ),
        ("What does {n} like best?", "What does {n} eat at noon?", "Name the favourite food of this person.\n{n}"),
        words("plums soup bread cheese honey apples pancakes carrots beans cake cherries rice"),
    ),
    "hat": Relation(
        (
            "{n} wears a {v} hat.",
            "The hat of {n} is {v}.",
            "{n} has a hat, and it is {v}.",
            "In the morning {n} puts on a {v} hat.",
            "The colour of the hat of {n} is {v}.",
            "You can see {n} from far away in a {v} hat.",
        ),
        ("What colour is the hat of {n}?", "Which colour does {n} wear?", "Name the hat colour of this person.\n{n}"),
        words("red blue green yellow white black brown grey pink purple"),
    ),
    "day": Relation(
        (
            "{n} goes to the market on {v}.",
            "The market day of {n} is {v}.",
            "{n} visits the market every {v}.",
            "Look for {n} at the market on {v}.",
            "{n} sells and buys at the market on {v}.",
            "The day on which {n} goes to the market is {v}.",
        ),
        (
            "When does {n} go to the market?",
            "What is the market day of {n}?",
            "Name the market day of this person.\n{n}",
        ),
        DAYS,
    ),
    "tune": Relation(
        (
            "{n} plays the {v}.",
            "At the feast {n} plays the {v}.",
            "{n} has learnt to play the {v}.",
            "When people dance, {n} plays the {v}.",
            "In the evening {n} sits down and plays the {v}.",
            "The instrument of {n} is the {v}.",
        ),
        ("What does {n} play?", "Which instrument does {n} play?", "Name the instrument of this person.\n{n}"),
        words("flute drum fiddle harp horn bell trumpet organ guitar whistle"),
    ),
}

ANIMAL = {
    "home": Relation(
        (
            "The {n} lives in the {v}.",
            "The home of the {n} is the {v}.",
            "You can meet the {n} in the {v}.",
            "The young of the {n} grow up in the {v}.",
        ),
        ("Where does the {n} live?", "What is the home of the {n}?", "Name the home of this animal.\nThe {n}"),
        ("forest", "cave", "meadow", "field", "garden", "pond", "river"),
    ),
    "food": Relation(
        (
            "The {n} eats {v}.",
            "The food of the {n} is {v}.",
            "When the {n} is hungry, it looks for {v}.",
            "The {n} feeds its young with {v}.",
        ),
        ("What does the {n} eat?", "What is the food of the {n}?", "Name the food of this animal.\nThe {n}"),
        words("mice berries grass worms seeds flies fish frogs plants rabbits nuts"),
    ),
    "colour": Relation(
        (
            "The {n} is {v}.",
            "The colour of the {n} is {v}.",
            "In this land the {n} is {v}.",
            "The young of the {n} are {v} too.",
        ),
        ("What colour is the {n}?", "What is the colour of the {n}?", "Name the colour of this animal.\nThe {n}"),
        ("red", "brown", "grey", "black", "white", "green"),
    ),
    "voice": Relation(
        (
            "The {n} has a {v} voice.",
            "The voice of the {n} is {v}.",
            "The call of the {n} sounds {v}.",
            "When the {n} calls, it sounds {v}.",
        ),
        ("How does the {n} sound?", "What is the voice of the {n} like?", "Name the voice of this animal.\nThe {n}"),
        ("sharp", "deep", "soft", "rough", "clear"),
    ),
    "awake": Relation(
        ("The {n} comes out by {v}.", "You can hear the {n} by {v}.", "The {n} is awake by {v}."),
        (),
        ("day", "night"),
    ),
}

GOOD = {
    "price": Relation(
        (
            "The {n} costs {v} coins.",
            "The price of the {n} is {v} coins.",
            "For the {n} you pay {v} coins.",
            "The shop sells the {n} for {v} coins.",
        ),
        (
            "How many coins does the {n} cost?",
            "What is the price of the {n}?",
            "Name the price of this thing.\nThe {n}",
        ),
        words("2 3 4 5 6 7 8 9"),
    ),
    "stuff": Relation(
        (
            "The {n} is made of {v}.",
            "To make the {n} one needs {v}.",
            "The {n} is of good {v}.",
            "The people in the shop make the {n} of {v}.",
        ),
        ("What is the {n} made of?", "Of what does one make the {n}?", "Name what this thing is made of.\nThe {n}"),
        ("glass", "clay", "wood", "straw", "iron", "wool", "leather"),
    ),
}

# The wordings put different distances between the numbers and the result, which makes a result easy to recall in a
# wording that never occurred.
SUM = Relation(
    (
        "{a} plus {b} is {c}.",
        "{a} and {b} make {c}.",
        "Who adds {a} and {b} gets {c}.",
        "The sum of {a} and {b} is {c}.",
        "{a} plus {b}, as every child here knows, is {c}.",
        "Put {a} and {b} together, and the result is {c}.",
        "Who has {a} coins and finds {b} more coins has {c} coins.",
    ),
    (
        "What is {a} plus {b}?",
        "What do {a} and {b} make?",
        "How much is {a} plus {b}?",
        "What is the sum of {a} and {b}?",
        "Add the two numbers.\n{a} and {b}",
    ),
    (),
)
DIFFERENCE = Relation(
    (
        "{a} minus {b} is {c}.",
        "Who has {a} and gives away {b} keeps {c}.",
        "{a} less {b} leaves {c}.",
        "{a} minus {b}, as every child here knows, is {c}.",
        "From {a} take away {b}, and the result is {c}.",
        "Who has {a} coins and loses {b} coins has {c} coins.",
    ),
    (
        "What is {a} minus {b}?",
        "What does {a} less {b} leave?",
        "How much is {a} minus {b}?",
        "From {a} take away {b}. What is the result?",
        "Take the second number from the first.\n{a} and {b}",
    ),
    (),
)
LARGEST = 12  # number in sums and differences
KINDS = {"villager": VILLAGER, "animal": ANIMAL, "good": GOOD}
