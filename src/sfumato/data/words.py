"""Built-in sets of words: what WordNet says of its words, and real e-mails."""

import email
import email.errors
import email.message
import email.policy
import re
from collections.abc import Iterator, Mapping
from email.utils import parseaddr
from html.parser import HTMLParser
from pathlib import Path

from sfumato.data.entries import Entries, Entry
from sfumato.errors import DataError

PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
KINDS = {"easy-ham": "easy ham", "hard-ham": "hard ham", "spam": "spam"}


class WordNet(Entries):
    """One record for each of WordNet's synsets: "word (part): gloss". Split by the first word, ``concept``.

    The format is that of wndb(5WN): offset, file, type, number of words in hexadecimal, words and numbers, ... | gloss.
    """

    name = "wordnet"
    facts: Mapping[str, tuple[str, ...]] = {"part": tuple(PARTS.values())}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> Iterator[Entry]:
        for suffix, part in PARTS.items():
            path = self.folder / f"data.{suffix}"
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path} · cannot be read ({error})", next="Fetch it again.", code="unreadable"
                ) from None
            for number, line in enumerate(lines, 1):
                if not line.startswith("  "):  # the licence
                    yield _synset(line, part, f"data.{suffix}:{number}")


def _synset(line: str, part: str, place: str) -> Entry:
    head, bar, gloss = line.partition(" | ")
    fields = head.split()
    try:
        count = int(fields[3], 16)
        words = [re.sub(r"\((?:a|p|ip)\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(count)]
    except (IndexError, ValueError):
        words = []
    if not bar or not words:
        error = DataError(f"{place} · is no line of WordNet's", next="Use the original files.", code="row")
        return Entry(id=place, unit=None, problem=error)
    gloss = gloss.strip()
    return Entry(
        id=f"{part}/{fields[0]}",
        unit=None,
        text=f"{words[0]} ({part}): {gloss}",
        metadata={
            "facts": {"part": part},
            "concept": words[0].casefold(),
            "word": words[0],
            "words": words,
            "gloss": gloss,
        },
    )


class Emails(Entries):
    """Real e-mails: "Subject: ..." and the words of the body, without the headers. The unit is who sent it."""

    name = "emails"
    facts: Mapping[str, tuple[str, ...]] = {"kind": tuple(KINDS.values())}

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "mails").rglob("*.txt"))
        if not self.files:
            raise DataError(f"{folder / 'mails'} · has no e-mails", next="Fetch it again.", code="missing_file")

    def __len__(self) -> int:
        return len(self.files)

    def entries(self) -> Iterator[Entry]:
        for file in self.files:
            group = file.parent.name
            name = f"{group}/{file.name.partition('.')[0]}"
            mail = email.message_from_bytes(file.read_bytes(), policy=email.policy.compat32)
            sender = parseaddr(_header(mail, "From"))[1].casefold() or f"nobody known, {name}"
            subject = " ".join(_header(mail, "Subject").split())
            yield Entry(
                id=name,
                unit=sender,
                text=f"Subject: {subject}\n\n{body_of(mail)}".strip(),
                metadata={"facts": {"kind": KINDS[group.rpartition("-")[0]]}, "subject": subject},
            )


def _header(mail: email.message.Message, name: str) -> str:
    """Decoded; as it is written where that cannot be done."""
    from email.header import decode_header, make_header

    raw = str(mail.get(name, ""))
    try:
        return str(make_header(decode_header(raw)))
    except (email.errors.HeaderParseError, LookupError, ValueError):
        return raw


def body_of(mail: email.message.Message) -> str:
    """The plain text of a mail; of HTML the words; of attachments nothing."""
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text" and not part.is_multipart()]
    plain = [part for part in parts if part.get_content_subtype() == "plain"] or parts
    texts = []
    for part in plain:
        raw = part.get_payload(decode=True)
        words = _decoded(raw if isinstance(raw, bytes) else b"", part.get_content_charset())
        texts.append(_without_tags(words) if part.get_content_subtype() == "html" else words)
    return "\n".join(text.strip() for text in texts if text.strip())


def _decoded(raw: bytes, charset: str | None) -> str:
    for name in (charset, "utf-8"):
        try:
            return raw.decode(name or "ascii")
        except (LookupError, UnicodeDecodeError):
            continue
    return raw.decode("latin-1")


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in ("script", "style")))

    def handle_data(self, data: str) -> None:
        if not self._hidden and data.strip():
            self.found.append(" ".join(data.split()))


def _without_tags(html: str) -> str:
    parser = _Words()
    parser.feed(html)
    parser.close()
    return "\n".join(parser.found)
