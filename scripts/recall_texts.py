#!/usr/bin/env python3
"""Write documents that demand recall: passages and records that come again, word for word, after other text.

Texts to train an extended model on, mixed with ordinary ones (`latte extend --text`): what was read far back is the only thing
that tells how a repeated passage goes on, so latents must carry it. A document has 1 to 16 items of its own, paragraphs of the
texts given and made-up records (log lines, addresses, invoices, measurements, hexadecimal numbers, made-up words), in random
order and mixed with other paragraphs; none comes again within 700 characters of its beginning (`--least-distance`). Documents
differ in how many items they have, in the share of records among them and of other paragraphs around them: one number in pages
of prose is told apart by being a number, one of a hundred only by what stands before it. With `--sentences` records are also
sentences of the texts with numbers in the place of words, in any company. Nothing in them asks a question or names a key.

Examples:
    scripts/recall_texts.py --text texts/*.txt --megabytes 14 --out recall.txt
    scripts/recall_texts.py --text texts/*.txt --most-items 3 --records 1 --out few.txt    # a number or three in pages of prose
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

CONSONANTS, VOWELS = "bcdfghklmnprstvwz", "aeiou"
LEAST_DISTANCE = 700  # characters from beginning to beginning, more than a window of 128 tokens; the default


def paragraphs(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8", errors="ignore").split("\n")
    return [line for line in lines if 80 <= len(line) <= 700]


def word(rng: random.Random) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 4)))


def number(rng: random.Random, fewest: int, most: int) -> int:
    return rng.randrange(10 ** rng.randint(fewest, most))


def log_line(rng: random.Random) -> str:
    date = f"{rng.randrange(1900, 2030)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}"
    time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    return f"{date} {time} {word(rng)}[{rng.randrange(100, 9999)}]: {word(rng)} {word(rng)} {number(rng, 2, 7)}"


def address(rng: random.Random) -> str:
    first, last, street = (word(rng).capitalize() for _ in range(3))
    return f"{first} {last}, {rng.randrange(1, 300)} {street} Street, tel. {rng.randrange(10**6, 10**7)}"


def measurement(rng: random.Random) -> str:
    what, where = word(rng), word(rng).capitalize()
    return f"The {what} of {where} measured {number(rng, 2, 6)} {word(rng)} and cost {number(rng, 1, 5)} {word(rng)}."


def hexadecimal(rng: random.Random) -> str:
    return " ".join(f"{rng.randrange(2 ** rng.choice([8, 16, 32])):x}" for _ in range(rng.randint(3, 8)))


def invoice(rng: random.Random) -> str:
    price = f"{rng.randrange(1, 999)}.{rng.randrange(100):02d}"
    order = rng.randrange(10**5, 10**8)
    return f"Invoice {rng.randrange(10**4, 10**6)}: {rng.randrange(1, 99)} {word(rng)} at {price}, order {order}."


def made_up_words(rng: random.Random) -> str:
    return " ".join(word(rng) for _ in range(rng.randint(6, 16))).capitalize() + "."


RECORDS = (log_line, address, measurement, hexadecimal, invoice, made_up_words)


def numbered_sentence(rng: random.Random, pool: list[str]) -> str:
    """A sentence of the texts with numbers in the place of one to three words: in any company, not in that of records alone."""
    words = rng.choice(rng.choice(pool).split(". ")).split()
    for place in rng.sample(range(len(words)), min(len(words), rng.randint(1, 3))):
        words[place] = str(number(rng, 2, 6))
    return " ".join(words)


def record(rng: random.Random, pool: list[str], share_of_sentences: float) -> str:
    if share_of_sentences > 0 and rng.random() < share_of_sentences:
        return numbered_sentence(rng, pool)
    return rng.choice(RECORDS)(rng)


def document(rng: random.Random, pool: list[str], options: argparse.Namespace) -> str:
    size = rng.randint(3000, 14000)  # characters
    count = round(options.most_items ** rng.random())  # of 16 as often 1 to 4 as 4 to 16
    share_of_records = rng.random() if options.records is None else options.records
    items = [record(rng, pool, options.sentences) if rng.random() < share_of_records else rng.choice(pool) for _ in range(count)]
    last = [-options.least_distance] * len(items)
    share_of_others = 0.8 * rng.random()
    lines: list[str] = []
    written = 0
    while written < size:
        item = rng.randrange(len(items))
        if rng.random() < share_of_others or written - last[item] < options.least_distance:
            line = rng.choice(pool)
        else:
            line = items[item]
            last[item] = written
        lines.append(line)
        written += len(line) + 1
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files whose paragraphs are repeated, a line each")
    parser.add_argument("--megabytes", type=float, default=14, help="of text to write (default: %(default)s)")
    parser.add_argument("--most-items", type=int, default=16, help="a document has of its own (default: %(default)s)")
    parser.add_argument("--records", type=float, help="share of records among them, 0 to 1 (default: another in each document)")
    parser.add_argument(
        "--sentences",
        type=float,
        default=0.0,
        help="share of records that are sentences with numbers in them (default: %(default)s)",
    )
    parser.add_argument(
        "--least-distance",
        type=int,
        default=LEAST_DISTANCE,
        help="characters from an item's beginning to where it may come again (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.megabytes <= 0:
        parser.error(f"--megabytes {options.megabytes}: must be positive")
    if not 1 <= options.most_items <= 1000:
        parser.error(f"--most-items {options.most_items}: must be in 1 to 1000")
    if options.least_distance < 0:
        parser.error(f"--least-distance {options.least_distance}: must not be negative")
    if not 0 <= options.sentences <= 1:
        parser.error(f"--sentences {options.sentences}: must be in 0 to 1")
    if options.records is not None and not 0 <= options.records <= 1:
        parser.error(f"--records {options.records}: must be in 0 to 1")
    return options


def main() -> int:
    options = arguments()
    rng = random.Random(options.seed)
    try:
        pool = [line for path in options.text for line in paragraphs(path)]
        if not pool:
            print("recall_texts: error: --text has no line of 80 to 700 characters", file=sys.stderr)
            return 1
        unfinished = options.out.with_suffix(options.out.suffix + ".part")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                while file.tell() < options.megabytes * 1e6:
                    file.write(document(rng, pool, options) + "\n\n")
            unfinished.replace(options.out)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        print(f"recall_texts: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
