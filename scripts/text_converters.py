"""How the files of Debian packages become running text: cleaning, and a converter for each form that they come in.

A converter takes a file's name and bytes and gives its documents, each a list of blocks; render() makes a document's text.
scripts/training_texts.py says which files go through which.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

Block = tuple[str, str]  # (kind, text): h heading, p paragraph, li list item, dt term, td table cell, v verse, code
Document = list[Block]
Member = tuple[str, bytes]
Convert = Callable[[str, bytes], list[Document]]

MIN_LETTERS = 0.70  # share of letters and the blanks between them in a document's prose
MIN_SENTENCES = 0.55  # share of a document's characters that are in paragraphs that read like sentences
MIN_PROSE = 300  # characters of prose below which a document is left out


class SourceError(Exception):
    """A source that cannot be had; the message says what to do."""


# --- cleaning ---------------------------------------------------------------------------------------------------------

TAGS = re.compile(r"<[^<>]*>")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff\u00b6\x00-\x08\x0e-\x1f\x7f]")
SENTENCE_END = re.compile(r"[.!?:;…]['\"’”)\]]*$")
BOILERPLATE = re.compile(
    r"(?i)\W*(download the ebook|prev(ious)?|next|up|home|top|note|see also|(table of )?contents|libreoffice [\d.]+ help)\W*$"
)
URL_ONLY = re.compile(r"^\W*(?:https?|ftp)://\S+\W*$")


def squeeze(text: str) -> str:
    text = re.sub(r"\s+", " ", INVISIBLE.sub("", text.replace("\u00a0", " "))).strip()
    return re.sub(r" ([,.;:!?)\]])(?=\s|$)", r"\1", text)


def code_text(text: str) -> str:
    lines = [INVISIBLE.sub("", line.replace("\u00a0", " ")).rstrip() for line in text.expandtabs(8).split("\n")]
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip("\n")


def letter_share(text: str) -> float:
    visible = sum(not char.isspace() for char in text)
    return sum(char.isalpha() for char in text) / visible if visible else 0.0


def reads_well(text: str) -> bool:
    """Whether a paragraph reads like sentences rather than like a label, a signature or a table row."""
    return len(text) >= 40 and text.count(" ") >= 6 and letter_share(text) >= 0.8 and bool(SENTENCE_END.search(text))


def drop_lists_of_labels(blocks: Document) -> Document:
    """Drop runs of short lines without punctuation: tables of contents, menus, lists of names."""
    kept: Document = []
    run: Document = []
    for block in [*blocks, ("end", "")]:
        kind, text = block
        if kind in ("p", "li", "td", "dt") and len(text) < 70 and not SENTENCE_END.search(text):
            run.append(block)
            continue
        if len(run) < 6:
            kept.extend(run)
        run = []
        if kind != "end":
            kept.append(block)
    return kept


def render(blocks: Document, seen: set[int], strict: bool = True) -> str:
    """The text of one document, or "" when too little of it is prose. Long paragraphs that were seen before are dropped."""
    blocks = [(kind, text) for kind, text in blocks if text and not URL_ONLY.match(text) and not BOILERPLATE.match(text)]
    blocks = drop_lists_of_labels([(kind, text) for kind, text in blocks if kind != "td" or len(text) >= 60])
    fresh: Document = []
    for kind, text in blocks:
        if len(text) >= 100:
            key = hash(text)
            if key in seen:
                continue
            seen.add(key)
        fresh.append((kind, text))
    prose = [text for kind, text in fresh if kind != "code"]
    total = sum(map(len, prose))
    if total < MIN_PROSE:
        return ""
    if strict:
        if sum(text in ("Parameters", "Parameters:") for text in prose) > 3:  # signatures of functions
            return ""
        joined = "".join(prose)
        letters = sum(char.isalpha() or char == " " for char in joined)
        sentences = sum(len(text) for kind, text in fresh if kind == "v" or (kind != "code" and reads_well(text)))
        if letters < MIN_LETTERS * len(joined) or sentences < MIN_SENTENCES * total:
            return ""
    # A code block stays while the prose before it outweighs the code so far.
    parts: list[str] = []
    kinds: list[str] = []
    prose_chars = code_chars = 0
    for kind, text in fresh:
        if kind == "code":
            if len(text) > 1500 or letter_share(text) < 0.6 or code_chars + len(text) > 0.4 * prose_chars:
                continue
            code_chars += len(text)
        else:
            prose_chars += len(text)
        while kind == "h" and len(kinds) >= 2 and kinds[-1] == kinds[-2] == "h":
            kinds.pop()
            parts.pop()
        parts.append("- " + text if kind == "li" else text)
        kinds.append(kind)
    while kinds and kinds[-1] in ("h", "dt"):
        kinds.pop()
        parts.pop()
    return "\n\n".join(parts)


# --- HTML -------------------------------------------------------------------------------------------------------------

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"}
SKIP_TAGS = {"script", "style", "nav", "head", "footer", "aside", "select", "button", "form", "svg", "object", "title"}
SKIP_NAMES = set(
    "navheader navfooter toc toctree-wrapper sphinxsidebar sphinxsidebarwrapper related headerlink footer breadcrumb "
    "breadcrumbs index legalnotice revhistory viewcode-link indextable wy-nav-side rst-versions rst-footer-buttons "
    "wy-breadcrumbs wy-nav-top contents nosearch lineno linenos mainmenu submenu menu list-of-figures list-of-tables "
    "list-of-examples lot sidebar nav nav-wrapper nav-wide-wrapper menu-bar quickview page-header preamble-toc topmenu "
    "TOC shortcontents element-contents nav_tree footnote-links rst-other-versions table-of-contents guilabel-nav searchbox "
    "sidetoc docnav producttitle producttitle-nav noprint navigation tocinline qanda-toc mod-indexentry linenodiv".split()
)
BLOCK_TAGS = set(
    "p div section article main header blockquote ul ol dl dd tr table tbody thead body html center figure figcaption "
    "caption address details summary fieldset hr".split()
)


class Page(HTMLParser):
    """Collects the blocks of a page in `blocks`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: Document = []
        self.buffer: list[str] = []
        self.kind = "p"
        self.skip_tag = ""
        self.skip_depth = 0
        self.pre = 0
        self.tables: list[int] = []

    def flush(self) -> None:
        if self.buffer:
            raw = "".join(self.buffer)
            self.buffer = []
            if self.pre:
                self.blocks.append(("code", code_text(raw.replace("\x0b", "\n"))))
            else:
                for piece in re.split(r"\x0b\s*\x0b", raw):
                    text = squeeze(piece)
                    if text:
                        self.blocks.append((self.kind, text))

    def blank(self) -> bool:
        return not any(part.strip() for part in self.buffer)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skip_tag:
            self.skip_depth += tag == self.skip_tag
            return
        if tag not in VOID and tag not in ("body", "html"):
            names: list[str] = []
            for key, value in attrs:
                if value and key in ("class", "id"):
                    names += value.split()
                elif key == "role" and value == "navigation":
                    names.append("nav")
            if tag in SKIP_TAGS or not SKIP_NAMES.isdisjoint(names):
                self.skip_tag, self.skip_depth = tag, 1
                return
        if tag == "br":
            self.buffer.append("\x0b")
        elif self.pre:
            self.pre += tag == "pre"
        elif tag == "pre":
            self.flush()
            self.pre = 1
        elif len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.flush()
            self.kind = "h"
        elif tag in ("li", "dt", "td", "th"):
            self.flush()
            self.kind = "td" if tag == "th" else tag
        elif tag in BLOCK_TAGS:
            if not self.blank():
                self.flush()
                self.kind = "p"
            elif self.kind not in ("li", "td", "h"):
                self.kind = "p"
            if tag == "table":
                self.tables.append(len(self.blocks))

    def handle_endtag(self, tag: str) -> None:
        if self.skip_tag:
            if tag == self.skip_tag:
                self.skip_depth -= 1
                if not self.skip_depth:
                    self.skip_tag = ""
            return
        if self.pre:
            if tag == "pre":
                if self.pre == 1:
                    self.flush()
                    self.kind = "p"
                self.pre -= 1
            return
        if tag in BLOCK_TAGS or tag in ("li", "dt", "td", "th") or (len(tag) == 2 and tag[0] == "h" and tag[1].isdigit()):
            self.flush()
            self.kind = "p"
        if tag == "table" and self.tables:
            start = self.tables.pop()
            rows = [text for _, text in self.blocks[start:]]
            if rows and sum(map(len, rows)) < 60 * len(rows):
                del self.blocks[start:]

    def handle_data(self, data: str) -> None:
        if not self.skip_tag:
            self.buffer.append(data)

    def finish(self) -> Document:
        self.close()
        self.flush()
        return self.blocks


def from_html(name: str, data: bytes) -> list[Document]:
    head = data[:2000].lower()
    page = Page()
    page.feed(data.decode("latin-1" if b"iso-8859-1" in head else "utf-8", errors="replace"))
    return [page.finish()]


# --- plain text -------------------------------------------------------------------------------------------------------

UNDERLINE = re.compile(r"^\s*([=\-~*.^#+\"'])\1{2,}\s*$")
LINE_START = re.compile(r"\s*[-'\"“‘(`]*[A-Z]|\s*<\S+> ")  # of a line of verse, or of a line of talk
DRAWING = re.compile("[\u2500-\u259f]")


def text_blocks(text: str, base: int = 0) -> Document:
    """Paragraphs of wrapped text: `base` is the indentation of ordinary paragraphs."""
    blocks: Document = []
    text = re.sub(".\b", "", text.replace("\r\n", "\n").replace("\f", "\n")).expandtabs(8)
    for piece in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in piece.split("\n") if line.strip()]
        if not lines or DRAWING.search(piece):
            continue
        if len(lines) >= 2 and UNDERLINE.match(lines[1]) and len(lines[0].strip()) < 100:
            blocks.append(("h", squeeze(lines[0])))
            lines = lines[2:]
        lines = [line for line in lines if not UNDERLINE.match(line)]
        if not lines:
            continue
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        joined = squeeze(" ".join(lines))
        verse = len(lines) >= 3 and max(len(line.strip()) for line in lines[:-1]) < 72 and letter_share(joined) > 0.85
        verse = verse and sum(bool(LINE_START.match(line)) for line in lines) >= 0.8 * len(lines)
        bullet = re.match(r"[*\-o+•] +(?=\S)", joined)
        if bullet:
            items = re.split(r"\n\s*[*\-o+•] +", "\n" + "\n".join(lines))
            blocks.extend(("li", squeeze(item)) for item in items if item.strip())
        elif verse:
            blocks.append(("v", "\n".join(re.sub(r"^ {8,}", "    ", line[indent:]) for line in lines)))
        elif indent >= base + 4 and not reads_well(joined):
            blocks.append(("code", code_text("\n".join(line[indent:] for line in lines))))
        else:
            blocks.append(("p", joined))
    return blocks


def from_text(name: str, data: bytes) -> list[Document]:
    return [text_blocks(data.decode("utf-8", errors="replace"))]


def from_live_manual(name: str, data: bytes) -> list[Document]:
    text = re.sub(r"「\d+」|#", "", data.decode("utf-8", errors="replace"))
    return [text_blocks(re.sub(r"(?<!\w)[*/](\S(?:[^*/\n]*\S)?)[*/](?!\w)", r"\1", text))]


def from_jargon(name: str, data: bytes) -> list[Document]:
    text = re.sub(r"[{}]", "", data.decode("utf-8", errors="replace"))
    blocks = [("p", body.lstrip(":")) if body.startswith(":") else (kind, body) for kind, body in text_blocks(text, base=3)]
    return [blocks]


def from_fortunes(name: str, data: bytes) -> list[Document]:
    text = data.decode("utf-8", errors="replace")
    blocks: Document = []
    for fortune in re.split(r"\n%\n", text):
        blocks.extend(("p" if kind == "code" else kind, body) for kind, body in text_blocks(fortune))
    return [blocks]


def from_vim(name: str, data: bytes) -> list[Document]:
    lines: list[str] = []
    code = False
    for line in data.decode("utf-8", errors="replace").expandtabs(8).split("\n"):
        if code and line and not line[0].isspace():
            code = False
            line = line.removeprefix("<")
            lines.append("")
        if code:
            lines.append("        " + line)
            continue
        if re.match(r"^\s*(\|[\w.-]+\|\s|vim:|Copyright:|Next chapter|Previous chapter|Table of contents|Type .*gO)", line):
            continue
        tagged = re.search(r"\*[^\s*|]+\*", line) is not None
        line = re.sub(r"\*[^\s*|]+\*", "", line)
        line = re.sub(r"\|([^\s|]+)\|", r"\1", line)
        heading = tagged or line.endswith("~") or re.match(r"^={20,}", line)
        line = re.sub(r"\s*~$|^[=-]{20,}$", "", line)
        code = bool(re.search(r"(^|\s)>(vim|lua)?$", line))
        line = re.sub(r"(^|\s)>(vim|lua)?$", "", line)
        if heading or re.match(r"^ {2,4}[A-Z]", line):
            lines.append("")
        lines.append(line)
        if heading or code:
            lines.append("")
    return [text_blocks("\n".join(lines[1:]))]


# --- POD --------------------------------------------------------------------------------------------------------------

POD_CODE = re.compile(r"([A-Z])<(?:<+ (.*?) >+>|([^<>]*))>", re.S)
POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|", "amp": "&", "quot": '"'}


def pod_inline(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        letter, body = match[1], match[2] if match[2] is not None else match[3]
        if letter == "E":
            return POD_ESCAPES.get(body, body if len(body) == 1 else "").replace("<", "\x01").replace(">", "\x02")
        if letter == "L":
            shown, _, target = body.partition("|")
            body = shown if target else body.replace("/", " ").replace('"', "")
        return "" if letter in "XZ" else body.replace("<", "\x01").replace(">", "\x02")

    for _ in range(6):
        replaced = POD_CODE.sub(plain, text)
        if replaced == text:
            break
        text = replaced
    return text.replace("\x01", "<").replace("\x02", ">")


def from_pod(name: str, data: bytes) -> list[Document]:
    blocks: Document = []
    skip = False
    for piece in re.split(r"\n\s*\n", data.decode("utf-8", errors="replace")):
        piece = piece.strip("\n")
        command = re.match(r"=(\w+)\s*(.*)", piece, re.S)
        if command:
            word, rest = command[1], squeeze(pod_inline(command[2]))
            skip = word in ("begin", "for") or (skip and word != "end" and word != "cut")
            if word.startswith("head"):
                blocks.append(("h", rest.capitalize() if rest.isupper() else rest))
            elif word == "item" and re.sub(r"[*\d.]", "", rest):
                blocks.append(("dt", rest.lstrip("* ")))
        elif skip or not piece.strip():
            continue
        elif piece[0].isspace():
            blocks.append(("code", code_text(piece)))
        else:
            blocks.append(("p", squeeze(pod_inline(piece))))
    return [blocks]


# --- R's serialised character vectors ---------------------------------------------------------------------------------


def r_strings(data: bytes) -> list[str]:
    """A character vector in R's XDR serialisation."""
    version, at = struct.unpack_from(">i", data, 2)[0], 14
    if data[:2] != b"X\n" or version not in (2, 3):
        raise SourceError("the R data is not in XDR serialisation of version 2 or 3: adapt r_strings() to the new package")
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">ii", data, at)
    at += 8
    if flags & 255 != 16:
        return []
    strings: list[str] = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, at)
        at += 8
        strings.append(data[at : at + max(length, 0)].decode("utf-8", errors="replace"))
        at += max(length, 0)
    return strings


def from_rdb(name: str, data: bytes) -> list[Document]:
    """A lazy-load database: each object is its length, four bytes, and a zlib stream."""
    documents: list[Document] = []
    while data:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        text = re.sub(r"_([^_]+)_", r"\1", "\n".join(lines))
        text = re.split(r"\n.*(?:End of (?:the |this )?Project Gutenberg|\*\*\* ?END OF)", text)[0]
        blocks: Document = []
        for piece in re.split(r"\n\s*\n", text):
            body = squeeze(piece)
            heading = len(body) < 60 and (body.isupper() or re.match(r"(?i)(chapter|volume|by jane)\b", body) or not blocks)
            blocks.append(("h" if heading else "p", body))
        documents.append([block for block in blocks if block[1] and block[1] != "THE END"])
    return documents


# --- SWORD modules (OSIS markup in blocks of zlib) --------------------------------------------------------------------


def sword_blocks(files: dict[str, bytes], stem: str) -> Iterator[str]:
    letter = "c" if f"{stem}.czs" in files else "b"
    index, packed = files[f"{stem}.{letter}zs"], files[f"{stem}.{letter}zz"]
    for offset, size, _ in struct.iter_unpack("<3I", index[: len(index) // 12 * 12]):
        if size:
            yield zlib.decompress(packed[offset : offset + size]).decode("utf-8", errors="replace")


def osis_blocks(text: str, commentary: bool) -> Document:
    text = re.sub(r"<note\b[^>]*>.*?</note>" if not commentary else r"<milestone\b[^>]*>", " ", text, flags=re.S)
    text = re.sub(r"<table>.*?</table>|<title[^>]*>\s*(?:Chapter Outline|Chapter \d+)\s*</title>", " ", text, flags=re.S)
    text = re.sub(r'<chapter\b[^>]*\bosisID="[^"]*\.(\d+)"[^>]*sID=[^>]*>', "\n\n\x01Chapter \\1\n\n", text)
    text = re.sub(r"<title\b[^>]*>(.*?)</title>", lambda m: "\n\n\x01" + TAGS.sub("", m[1]) + "\n\n", text, flags=re.S)
    text = re.sub(r'<(?:/?p|/?list|/?item|lg|/lg|div\b[^>]*"x-p")[^>]*>', "\n\n", text)
    text = re.sub(r"</l>|<l\b[^>]*eID[^>]*>", "\x02", text)
    text = TAGS.sub("", text)
    for entity, char in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'"), ("&amp;", "&")):
        text = text.replace(entity, char)
    blocks: Document = []
    for piece in re.split(r"\n\s*\n", text):
        if piece.startswith("\x01"):
            blocks.append(("h", squeeze(piece[1:])))
            continue
        lines = [squeeze(line) for line in piece.split("\x02")]
        lines = [line for line in lines if line]
        if len(lines) > 1:
            blocks.append(("v", "\n".join(lines)))
        elif lines:
            blocks.append(("p", lines[0]))
    return blocks


def from_sword(members: list[Member]) -> list[Document]:
    files = dict(members)
    documents: list[Document] = []
    stems = sorted({name.rsplit(".", 1)[0] for name in files})  # .../nt, .../ot
    for stem in stems if "ztext" in stems[0] else reversed(stems):  # a Bible may be cut short: its New Testament comes first
        for text in sword_blocks(files, stem):
            documents.append(osis_blocks(text, "comments" in stem))
    merged: list[Document] = []
    for blocks in documents:  # a module may hold a block for each chapter: join the small ones
        if merged and sum(len(text) for _, text in merged[-1]) < 5000:
            merged[-1].extend(blocks)
        else:
            merged.append(blocks)
    return merged


# --- dictionaries -----------------------------------------------------------------------------------------------------


def dictionary_entries(text: str) -> Iterator[tuple[str, str]]:
    """(headword line, body) of a dictd text, whose headwords begin lines and whose bodies are indented."""
    for piece in re.split(r"\n(?=\S)", text):
        head, _, body = piece.partition("\n")
        if body.strip() and not head.startswith("00-database"):
            yield head, body


def from_foldoc(name: str, data: bytes) -> list[Document]:
    blocks: Document = []
    for head, body in dictionary_entries(data.decode("utf-8", errors="replace")):
        body = re.sub(r"\{\(?(?:https?|ftp)://[^}]*\}|\((?:19|20)\d\d-\d\d-\d\d\)", "", body)
        body = re.sub(r"(?m)^\s*\[[^\]]{10,300}\]\.?\s*$|(?m:^)\s*\[[^\]]{10,300}\]\.?(?=\n\s*\n)", "", body)
        body = re.sub(r"[{}]|^\s*<[^>\n]{2,60}>", "", body)
        entry = [block for block in text_blocks(body, base=3) if len(re.sub(r"\W", "", block[1])) > 5]
        entry = [(kind, re.sub(r"^(\d\. )?<[^>]{2,60}> ", r"\1", text)) for kind, text in entry]
        if sum(len(text) for kind, text in entry if kind == "p" and reads_well(text)) >= 150:
            blocks.append(("h", squeeze(head)))
            blocks.extend(entry)
    return [blocks]


def from_gcide(name: str, data: bytes) -> list[Document]:
    """The long entries of a dictionary; the short ones hardly hold a sentence."""
    documents: list[Document] = []
    blocks: Document = []
    for head, body in dictionary_entries(data.decode("utf-8", errors="replace")):
        body = re.sub(r"\[(?:1913 Webster|PJC|WordNet[^\]]*|Webster 1913[^\]]*|[^\]]{0,20}(?:PJC|PC))\]", "", body)
        body = re.sub(r"(?m)^\s*\[[^\[\]]*\]\s*$", "", re.sub(r"[{}]", "", body))
        entry = [(kind, re.sub(r"\s*--(?=[A-Z])", " — ", text)) for kind, text in text_blocks(body, base=12) if len(text) > 20]
        good = [(kind, text) for kind, text in entry if kind != "code" and letter_share(text) > 0.85]
        if good:  # without the end of the etymology
            good[0] = (good[0][0], re.sub(r"^[^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*\] *(?=\(|\d\.|[A-Z])", "", good[0][1]))
        if sum(len(text) for _, text in good) >= 1100:
            if len(blocks) > 500:
                documents.append(blocks)
                blocks = []
            blocks.append(("h", squeeze(re.sub(r"\s*\\.*", "", head))))
            blocks.extend(good)
    return [*documents, blocks]


def from_devil(name: str, data: bytes) -> list[Document]:
    text = data.decode("utf-8", errors="replace")
    text = text[max(text.find("PREFACE"), 0) :]
    return [text_blocks(re.sub(r"_([^_]+)_", r"\1", text), base=8)]


# --- games ------------------------------------------------------------------------------------------------------------

WML = re.compile(
    r'^\s*(?:\[(\w+)\]|speaker\s*=\s*"?([^"\n]+?)"?\s*$|(\w+)\s*=\s*_\s*"((?:[^"]|"")*)"(?:\s*\+\s*_\s*"((?:[^"]|"")*)")*)', re.M
)


def from_wesnoth(name: str, data: bytes) -> list[Document]:
    """Story and dialogue of a campaign's scenario."""
    blocks: Document = []
    speaker = ""
    titled = False
    for tag, who, key, text, more in WML.findall(data.decode("utf-8", errors="replace")):
        if tag:
            speaker = ""
        elif who:
            speaker = "" if who in ("unit", "second_unit", "narrator") or "$" in who or "{" in who else who.replace("_", " ")
        elif key in ("story", "message", "description", "name", "help_text"):
            body = TAGS.sub("", f"{text} {more}".replace('""', '"'))
            pieces = [squeeze(piece) for piece in re.split(r"\n\s*\n", body)]
            if key == "name":
                if not titled and len(pieces[0]) > 3:
                    blocks.append(("h", pieces[0]))
                titled = True
            elif key != "description" or len(pieces[0]) > 80:
                prefix = f"{speaker}: " if speaker and key == "message" else ""
                blocks.extend(("p", prefix + piece) for piece in pieces if piece and "$" not in piece)
    return [blocks]


STAND_INS = {
    "first": "Robin",
    "last": "Carter",
    "ship": "Sparrow",
    "planet": "Haven",
    "system": "Vesta",
    "origin": "Greenrock",
    "destination": "Haven in the Vesta system",
}


def from_endless_sky(name: str, data: bytes) -> list[Document]:
    documents: list[Document] = [[]]
    for line in data.decode("utf-8", errors="replace").split("\n"):
        found = re.match(r'(?:mission|planet) "([^"]+)"|\s+name ["`]([^"`]+)["`]', line)
        if found:
            if found[1]:
                documents.append([])
            if found[2] or line.startswith("planet"):
                documents[-1].append(("h", found[1] or found[2]))
            continue
        for ticked, quoted in re.findall(r'`([^`]+)`|"([^"]{60,})"', line):
            text = re.sub(r"<(\w[\w ]*)>", lambda m: STAND_INS.get(m[1], "the " + m[1].split()[-1]), ticked or quoted)
            documents[-1].append(("p", squeeze(text)))
    whole = [block for blocks in documents if sum(len(text) for _, text in blocks) > 200 for block in blocks]
    return [whole]
