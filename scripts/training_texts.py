#!/usr/bin/env python3
"""Collect long-form English text for training from packages of the Debian archive.

Every source is one Debian package, or a few of them. The script downloads them with `apt-get download`, unpacks them in a
temporary folder only (nothing is installed), turns novels, commentaries, game stories and manuals into running text and
writes one .txt per source. Sources whose file exists are skipped, so a run that was interrupted can simply be repeated.

The text is UTF-8. A paragraph is one line, except verse and code, which keep their lines. One blank line separates
paragraphs, two separate documents. Menus, indexes, tables of short cells and pages that hold little prose are left out.

heldout_persuasion.txt is a whole novel that is in none of the other files: keep it for evaluation.

The texts keep the licences of their packages (see /usr/share/doc/PACKAGE/copyright); none of them belongs to this project.

Example:
    scripts/training_texts.py --out texts
    scripts/training_texts.py --out texts --only austen jargon --extra notes.html diary.txt
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from text_converters import (
    Convert,
    Document,
    Member,
    SourceError,
    from_devil,
    from_endless_sky,
    from_foldoc,
    from_fortunes,
    from_gcide,
    from_html,
    from_jargon,
    from_live_manual,
    from_pod,
    from_rdb,
    from_sword,
    from_text,
    from_vim,
    from_wesnoth,
    render,
)

# --- the sources ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    name: str
    packages: tuple[str, ...]
    files: str  # regular expression on the path in the package
    convert: Convert | None  # None: all files of the package together are one SWORD module
    limit: float = 8.0  # megabytes of text
    first: tuple[str, ...] = ()  # parts of paths that come first
    drop: str = ""  # regular expression of paths that are left out
    strict: bool = True  # leave out documents that hold little prose


CAMPAIGNS = "httt trow utbs tsg did dm dw ei l low nr sof sota sotbe thot ttb".split()
NOT_PROSE = r"genindex|search\.html|/_|py-modindex|bookindex|changelog|copyright|/index\.html|release-notes|contents\.html"
LINUX = (
    "process admin-guide core-api filesystems kernel-hacking maintainer doc-guide RCU scheduler mm vm locking timers "
    "security networking trace driver-api dev-tools block power userspace-api virt accounting livepatch"
).split()

SOURCES = (
    Source("austen", ("r-cran-janeaustenr",), r"janeaustenr/data/Rdata\.rdb$", from_rdb, strict=False),
    Source("spurgeon_treasury", ("sword-comm-tdavid",), r"/zcom/.*\.[bc]z[sz]$", None, 14),
    Source("henry_commentary", ("sword-comm-mhcc",), r"/zcom/.*\.[bc]z[sz]$", None),
    Source("anarchism", ("anarchism",), r"/html/.*\.html$", from_html, 12, drop=r"index|links|pdf|contact|new\.html|biblio"),
    Source("bible_web", ("sword-text-web",), r"/ztext/.*\.[bc]z[sz]$", None, 4, strict=False),
    Source("wesnoth", tuple(f"wesnoth-1.16-{name}" for name in CAMPAIGNS), r"campaigns/.*\.cfg$", from_wesnoth, strict=False),
    Source("endless_sky", ("endless-sky-data",), r"endless-sky/data/.*\.txt$", from_endless_sky, 6, drop=r"jobs|names|variants"),
    Source("devils_dictionary", ("dict-devil",), r"devil\.dict\.dz$", from_devil, strict=False),
    Source("jargon", ("jargon-text",), r"jargon\.txt\.gz$", from_jargon, strict=False),
    Source(
        "stellarium",
        ("stellarium-data",),
        r"(skycultures|landscapes)/.*/description\.en\.utf8$",
        from_html,
    ),
    Source(
        "fortunes",
        ("fortunes", "fortunes-min"),
        r"share/games/fortunes/[a-z-]+$",
        from_fortunes,
        first=("literature", "people", "wisdom"),
        drop=r"ascii-art|translate-me|kernelnewbies|perl|magic|zippy|knghtbrd|/off",
        strict=False,
    ),
    Source(
        "debian_handbook",
        ("debian-handbook",),
        r"/html/en-US/.*\.html$",
        from_html,
        drop=NOT_PROSE,
    ),
    Source(
        "debian_manuals",
        (
            "developers-reference",
            "debian-policy",
            "debian-history",
            "debian-faq",
            "maint-guide",
            "debmake-doc",
            "debian-reference-en",
            "installation-guide-amd64",
            "aptitude-doc-en",
            "harden-doc",
            "debian-edu-doc-en",
        ),
        r"/(developers-reference/[\w-]+\.html|policy\.html/ch-[\w-]+\.html|docs/[\w-]+\.en\.html|FAQ/[\w-]+\.en\.html"
        r"|maint-guide/html/\w+\.en\.html|debmake-doc/html/\w+\.en\.html|debian-reference/ch\d+\.en\.html"
        r"|installation-guide-amd64/en/[\w-]+\.html|aptitude/html/en/\w+\.html|harden-doc/html/en-US/\w+\.html"
        r"|debian-edu-bookworm-manual\.html|fhs-3\.0\.html)$",
        from_html,
        drop=NOT_PROSE + r"|developers-reference/developers-reference\.html|appendix|/index",
    ),
    Source("live_manual", ("live-manual-txt",), r"live-manual\.en\.txt\.gz$", from_live_manual),
    Source(
        "rust_books",
        ("rust-doc",),
        r"html/(book|rust-by-example|nomicon|edition-guide|embedded-book|cargo|reference|rustc)/" r".*\.html$",
        from_html,
        6,
        first=("/book/", "nomicon"),
        drop=r"print\.html|/toc\.html|(first|second)-edition|2018-edition" r"|/src/|lints/listing",
    ),
    Source("gimp_manual", ("gimp-help-en",), r"help/en/.*\.html$", from_html, drop=NOT_PROSE + r"|gimp-help\.html|bibliography"),
    Source(
        "vim",
        ("vim-runtime",),
        r"/doc/[\w-]+\.txt$",
        from_vim,
        2.5,
        first=("usr_", "intro", "motion", "change", "insert", "editing", "undo", "windows"),
        drop=r"version\d|todo|help\.txt|builtin|tags|usr_toc|os_|digraph|if_|pi_|quickref|/index\.txt|ft_|hebrew|arabic|russian",
    ),
    Source(
        "git",
        ("git-doc",),
        r"/git-doc/.*\.html$",
        from_html,
        first=("user-manual", "gittutorial", "howto", "giteveryday", "/git"),
        drop=NOT_PROSE + r"|RelNotes",
    ),
    Source(
        "python",
        ("python3.11-doc",),
        r"/html/(tutorial|howto|whatsnew|library|faq|reference|extending|using|installing|distributing)/[\w.-]+\.html$",
        from_html,
        6,
        first=(
            "/tutorial/",
            "/howto/",
            "/faq/",
            "/using/",
            "/extending/",
            "/reference/",
            "whatsnew/3",
            "whatsnew/2",
            "/library/",
        ),
        drop=NOT_PROSE,
    ),
    Source(
        "perl",
        ("perl-doc",),
        r"/pod/[\w-]+\.pod$",
        from_pod,
        6,
        first=("intro", "tut", "perlfaq", "perlbook", "perlhist", "perlstyle", "perlunicode", "perlop", "perlsub"),
        drop=r"perltoc|perluniprops|perlapi|perlintern|perlmodlib|delta",
    ),
    Source(
        "linux",
        ("linux-doc-6.1",),
        r"/html/(" + "|".join(LINUX) + r")/.*\.html$",
        from_html,
        12,
        first=tuple(f"/{name}/" for name in LINUX),
        drop=NOT_PROSE + r"|maintainers\.html|abi-|kernel-api|api-summary|devices\.html" r"|kapi\.html|translations",
    ),
    Source(
        "postgresql",
        ("postgresql-doc-15",),
        r"/html/[\w-]+\.html$",
        from_html,
        drop=NOT_PROSE + r"|release-|sql-keywords|" r"biblio|features-|unsupported|errcodes|legalnotice",
        first=(
            "/intro",
            "/tutorial",
            "/sql",
            "/ddl",
            "/dml",
            "/queries",
            "/mvcc",
            "/index",
            "/performance",
            "/parallel",
            "/admin",
            "/runtime",
            "/backup",
            "/high-avail",
            "/plpgsql",
        ),
    ),
    Source(
        "sqlite",
        ("sqlite3-doc",),
        r"/sqlite3/[\w-]+\.html$",
        from_html,
        4,
        first=(
            "about",
            "whentouse",
            "different",
            "faq",
            "howtocorrupt",
            "atomiccommit",
            "queryplanner",
            "optoverview",
            "testing",
            "wal",
            "appfileformat",
        ),
        drop=r"requirements|crossref|syntaxdiagrams|capi3ref|changes|keyword_index|doclist|hlr\d|releaselog|/c3ref|sitemap|news",
    ),
    Source("postfix", ("postfix-doc",), r"/html/[A-Z_\d]+\.html$", from_html),
    Source(
        "django",
        ("python-django-doc",),
        r"/html/(intro|topics|howto|faq|misc|internals)/.*\.html$",
        from_html,
        first=("/intro/", "/topics/"),
        drop=NOT_PROSE + "|deprecation",
    ),
    Source("ntpsec", ("ntpsec-doc",), r"/html/[\w-]+\.html$", from_html, drop=NOT_PROSE),
    Source(
        "libreoffice_help",
        ("libreoffice-help-en-us",),
        r"help/en-US/text/(swriter|scalc|simpress|sdraw|shared|sdatabase)/" r".*\.html$",
        from_html,
        4,
        first=("/guide/",),
    ),
    Source(
        "lilypond",
        ("lilypond-doc-html",),
        r"Documentation/(learning|essay|usage|web)/[\w-]+\.html$",
        from_html,
        first=("/learning/", "/essay/"),
        drop=NOT_PROSE,
    ),
    Source("foldoc", ("dict-foldoc",), r"foldoc\.dict\.dz$", from_foldoc, 6, strict=False),
    Source("gcide", ("dict-gcide",), r"gcide\.dict\.dz$", from_gcide, 6, strict=False),
)


# --- download and write -----------------------------------------------------------------------------------------------


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SourceError(f"{command[0]} is missing: run this on Debian or a system derived from it") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(f"{' '.join(command)} failed ({reason}): run `apt-get update` as root, then try again")


def members(package: str, pattern: re.Pattern[str]) -> Iterator[Member]:
    """The files of a Debian package whose path matches, downloaded to a temporary folder; .gz and .dz are unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package], Path(folder))
        found = sorted(Path(folder).glob("*.deb"))
        if not found:
            raise SourceError(f"apt-get downloaded no {package}: check `apt-cache policy {package}`")
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(found[0])], stdout=subprocess.PIPE) as unpack:
            with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
                for entry in archive:
                    if entry.isfile() and pattern.search(entry.name):
                        stream = archive.extractfile(entry)
                        data = stream.read() if stream else b""
                        yield entry.name, gzip.decompress(data) if entry.name.endswith((".gz", ".dz")) else data


def write(path: Path, text: str) -> None:
    """Write the whole file or nothing."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text.strip() + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def assemble(documents: Iterable[Document], limit: float, strict: bool) -> str:
    seen: set[int] = set()
    texts: list[str] = []
    size = 0
    for blocks in documents:
        text = render(blocks, seen, strict)
        if text:
            texts.append(text)
            size += len(text.encode())
        if size >= limit * 1e6:
            break
    return "\n\n\n".join(texts)


def convert_source(source: Source) -> Iterator[Document]:
    pattern, drop = re.compile(source.files), re.compile(source.drop) if source.drop else None
    for group in [source.packages] if source.convert is None else [[package] for package in source.packages]:
        found = [item for package in group for item in members(package, pattern) if not (drop and drop.search(item[0]))]
        if not found:
            raise SourceError(f"{' '.join(group)} holds no file like {source.files}: adapt the source to the new package")

        def order(item: Member) -> tuple[int, str]:
            return next((at for at, part in enumerate(source.first) if part in item[0]), len(source.first)), item[0]

        if source.convert is None:
            yield from from_sword(found)
            continue
        for name, data in sorted(found, key=order):
            try:
                yield from source.convert(name, data)
            except (ValueError, struct.error, zlib.error) as error:
                log(f"{source.name}: left out {name}: {error}")


def build(source: Source, out: Path) -> int:
    documents: Iterable[Document] = convert_source(source)
    if source.name == "austen":
        novels = list(documents)
        held = [novel for novel in novels if novel[0][1].lower() == "persuasion"]
        if len(held) != 1:
            raise SourceError("Persuasion is not among the novels: adapt build() to the new package")
        write(out / "heldout_persuasion.txt", assemble(held, source.limit, strict=False))
        documents = [novel for novel in novels if novel is not held[0]]
    text = assemble(documents, source.limit, source.strict)
    if not text:
        raise SourceError("no text was left after cleaning: look at the package's files and adapt the source")
    write(out / f"{source.name}.txt", text)
    return len(text.encode())


def build_extra(path: Path, out: Path) -> int:
    readers: dict[str, Convert] = {".html": from_html, ".htm": from_html, ".xhtml": from_html, ".pod": from_pod}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path} ({error.strerror}): name an existing file with --extra") from error
    text = assemble(readers.get(path.suffix.lower(), from_text)(path.name, data), 1e6, strict=False)
    if not text:
        raise SourceError(f"{path} holds no prose: leave it out")
    write(out / f"extra_{path.stem}.txt", text)
    return len(text.encode())


def main() -> int:
    description, _, example = (__doc__ or "").partition("Example:\n")
    parser = argparse.ArgumentParser(
        description=description, epilog="example:\n" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the .txt files to; it is created")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="build these sources only; names: see below")
    parser.add_argument(
        "--extra", nargs="+", type=Path, metavar="FILE", default=[], help="clean these files too: text, HTML, POD"
    )
    parser.epilog = f"sources: {' '.join(source.name for source in SOURCES)}\n\n{parser.epilog}"
    args = parser.parse_args()
    known = {source.name for source in SOURCES}
    unknown = sorted(set(args.only) - known)
    if unknown:
        parser.error(f"unknown source {' '.join(unknown)}: choose from {' '.join(sorted(known))}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot create {args.out} ({error.strerror}): name a folder that can be written with --out")

    jobs: list[tuple[str, Callable[[], int]]] = []
    for source in SOURCES:
        if not args.only or source.name in args.only:
            jobs.append((source.name, lambda source=source: build(source, args.out)))
    jobs += [(f"extra_{path.stem}", lambda path=path: build_extra(path, args.out)) for path in args.extra]
    failed: list[str] = []
    for at, (name, job) in enumerate(jobs, 1):
        if (args.out / f"{name}.txt").exists() and (name != "austen" or (args.out / "heldout_persuasion.txt").exists()):
            log(f"[{at}/{len(jobs)}] {name}: there already")
            continue
        start = time.monotonic()
        try:
            size = job()
            log(f"[{at}/{len(jobs)}] {name}: {size / 1e6:.2f} MB in {time.monotonic() - start:.0f} s")
        except (SourceError, OSError, tarfile.TarError) as error:
            failed.append(name)
            log(f"[{at}/{len(jobs)}] {name}: {error}")
    if failed:
        log(f"no text from {' '.join(failed)}: see the messages above, then run the same command again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
