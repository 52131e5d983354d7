"""Demo corpus: texts of four clearly different domains, each split by document, had from packages.

| domain | training documents                          | held-out documents                        |
|--------|---------------------------------------------|-------------------------------------------|
| c      | headers of musl, libuv (MIT), curl (curl    | headers of libyaml, jansson, expat (MIT), |
|        | licence), lz4, zstd, pcre2, libevent (BSD), | zlib (Zlib licence)                       |
|        | sqlite (public domain)                      |                                           |
| french | French manual pages of manpages-fr (GPL-3+) | those of shadow (BSD-3-Clause) and xz(1)  |
|        |                                             | (public domain)                           |
| legal  | licence texts of the npm package            | the texts of the families in              |
|        | spdx-license-list (the list is CC0-1.0, the | LEGAL_HELDOUT, from the same package      |
|        | texts are their authors', quoted verbatim)  |                                           |
| sql    | generated here, over the tables of          | generated here, over the tables of        |
|        | SQL_TRAIN                                   | SQL_HELDOUT                               |

Text of no domain, on which no expert is trained, is `other`: two novels out of the tests of
pierrec/lz4, the Devil's Dictionary, the Jargon File (public domain), German manual pages of shadow
and the Python of click (BSD-3-Clause).

Needs Debian or a relative (`apt-get download`, `dpkg-deb`, `groff`) and `npm`.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

DOMAINS = ("c", "french", "legal", "sql")

C_TRAIN = [
    "musl-dev",
    "libuv1-dev",
    "libcurl4-openssl-dev",
    "liblz4-dev",
    "libzstd-dev",
    "libpcre2-dev",
    "libevent-dev",
    "libsqlite3-dev",
]
C_HELDOUT = ["zlib1g-dev", "libyaml-dev", "libjansson-dev", "libexpat1-dev"]
FRENCH_TRAIN = ["manpages-fr"]
FRENCH_HELDOUT = ["passwd", "xz-utils"]  # passwd is shadow's package
XZ_PUBLIC_DOMAIN = "xz.1.gz"  # the scripts' pages in xz-utils are GPL-2+
FRENCH_WORDS = r"\b(?:le|la|les|un|une|des|du|de|et|est|sont|que|qui|pour|dans|ce|ne|pas)\b"
GERMAN_WORDS = r"\b(?:der|die|das|den|dem|ein|eine|und|ist|sind|wird|werden|zu|mit|nicht|für)\b"
ENGLISH_WORDS = r"\b(?:the|is|are|of|to|and|be|with|this|not|for|command|must)\b"
SPDX = "spdx-license-list@6.12.0"
LEGAL_HELDOUT = "CC0 PDDL ECL EUPL OFL Python PostgreSQL Vim W3C Zimbra AFL NASA CDLA"
LEGAL_LEFT_OUT = "OSL Apache CNRI PSF CC ODC"  # share sentences with a held-out text
NOVELS_PACKAGE = "golang-github-pierrec-lz4-dev"
NOVELS = ("Mark.Twain-Tom.Sawyer.txt", "pg1661.txt")  # the latter: Sherlock Holmes
DICTIONARIES = {"dict-devil": "\nABASEMENT,", "dict-jargon": "\nabbrev\n"}  # where each begins
SQL_DOCUMENTS = 700
SQL_HELDOUT_DOCUMENTS = 24


def documents(domain: str, cache: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the training and the held-out documents of `domain`, by name, in a fixed order.

    Packages are kept in `cache`; `other` has nothing to train on. Raises RuntimeError when a
    package cannot be fetched.
    """
    if domain == "c":
        return _headers(C_TRAIN, cache), _headers(C_HELDOUT, cache)
    if domain == "french":
        heldout = manuals(FRENCH_HELDOUT, cache)
        return manuals(FRENCH_TRAIN, cache), {
            name: _prose(heldout[name], FRENCH_WORDS) for name in heldout
        }
    if domain == "legal":
        return _licences(cache)
    if domain == "sql":
        return (
            {f"train{i}": _sql_document(f"train{i}", SQL_TRAIN) for i in range(SQL_DOCUMENTS)},
            {
                f"heldout{i}": _sql_document(f"heldout{i}", SQL_HELDOUT)
                for i in range(SQL_HELDOUT_DOCUMENTS)
            },
        )
    if domain == "other":
        return {}, _other(cache)
    raise ValueError(f"{domain!r} is not one of {', '.join(DOMAINS)}, other")


def _headers(packages: Iterable[str], cache: Path) -> dict[str, str]:
    """Every C header of some Debian packages, without the comments that state a licence."""
    found = {}
    for package in packages:
        root = _debian_package(package, cache)
        for path in sorted(root.rglob("*.h")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            text = re.sub(
                r"/\*.*?\*/",
                lambda comment: (
                    "" if re.search("(?i)copyright|licen[sc]e", comment[0]) else comment[0]
                ),
                text,
                flags=re.DOTALL,
            )
            found[f"{package}: {path.name}"] = _tidy(text)
    return found


def manuals(packages: Iterable[str], cache: Path, language: str = "fr") -> dict[str, str]:
    """Every manual page of some Debian packages, one paragraph a line, unindented."""
    found = {}
    groff = [
        "groff",
        "-k",
        "-Kutf8",
        "-man",
        "-Tutf8",
        "-P-c",
        "-P-b",
        "-P-o",
        "-P-u",
        "-rLL=2000n",
        "-rHY=0",
        "-dAD=l",
    ]
    for package in packages:
        root = _debian_package(package, cache) / "usr/share/man" / language
        for path in sorted(root.rglob("*.gz")):
            if path.is_symlink() or (package == "xz-utils" and path.name != XZ_PUBLIC_DOMAIN):
                continue
            page = gzip.decompress(path.read_bytes())
            if page.startswith(b".so "):
                continue
            done = subprocess.run(groff, input=page, capture_output=True, check=True)
            lines = done.stdout.decode().splitlines()
            text = "\n".join(re.sub(r"\s+", " ", line).strip() for line in lines[1:-1])
            text = text.split("\nTRADUCTION\n")[0]  # who translated it, the same on every page
            found[f"{package}: {path.stem}"] = _tidy(text)
    return found


def _prose(text: str, words: str) -> str:
    """Keep the paragraphs that are whole sentences with `words`: some pages are half English."""
    kept = [
        line
        for line in text.splitlines()
        if len(line) > 60
        and len(re.findall(words, line)) * 12 > len(line.split())
        and not re.search(ENGLISH_WORDS, line)
    ]
    return "\n\n".join(kept) + "\n"


def _licences(cache: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The SPDX licence texts, whole families (the identifier up to a digit) on one side."""
    train, heldout = {}, {}
    for path in sorted((_npm_package(SPDX, cache) / "licenses").glob("*.json")):
        text = _tidy(json.loads(path.read_text(encoding="utf-8"))["licenseText"])
        family = path.stem.split("-")[0]
        if text.count(" the ") * 400 < len(text):  # not English, or a list
            continue
        if family in LEGAL_HELDOUT.split():
            heldout[path.stem] = text
        elif family not in LEGAL_LEFT_OUT.split():
            train[path.stem] = text
    return train, heldout


def _other(cache: Path) -> dict[str, str]:
    """Six documents of no domain."""
    found = {}
    tests = "usr/share/gocode/src/github.com/pierrec/lz4/testdata"
    for name in NOVELS:
        path = _debian_package(NOVELS_PACKAGE, cache) / tests / name
        text = path.read_text(encoding="utf-8-sig", errors="ignore")
        text = text.partition("*** START OF")[2] or text
        found[f"{NOVELS_PACKAGE}: {name}"] = _tidy(text.partition("\nEnd of the Project")[0])
    for package, start in DICTIONARIES.items():
        path = next((_debian_package(package, cache) / "usr/share/dictd").glob("*.dict.dz"))
        text = gzip.decompress(path.read_bytes()).decode()
        found[f"{package}: {path.stem}"] = _tidy(start + text.partition(start)[2])
    pages = manuals(["passwd"], cache, "de").values()
    prose = "\n".join(_prose(page, GERMAN_WORDS) for page in pages)
    found["passwd: German pages"] = _tidy(prose)
    modules = sorted(_debian_package("python3-click", cache).rglob("click/*.py"))
    texts = [path.read_text(encoding="utf-8") for path in modules]
    found["python3-click: modules"] = _tidy("\n\n".join(texts))
    return found


def _tidy(text: str) -> str:
    """Drop trailing blanks and runs of empty lines."""
    text = "\n".join(line.rstrip() for line in text.expandtabs(8).splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _debian_package(package: str, cache: Path) -> Path:
    """Download and unpack a Debian package, once."""
    target = cache / package
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "download", "-qq", package], cache)
        deb = next(cache.glob(f"{package}_*.deb"))
        scratch = cache / f".{package}"
        _run(["dpkg-deb", "-x", str(deb), str(scratch)], cache)
        scratch.rename(target)
    return target


def _npm_package(package: str, cache: Path) -> Path:
    """Download and unpack an npm package, once."""
    target = cache / package
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archive = cache / _run(["npm", "pack", "--silent", package], cache).split()[-1]
        scratch = cache / f".{package}"
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        scratch.rename(target)
    return target / "package"


def _run(command: list[str], cwd: Path) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed; the demo corpus needs it") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{error.stderr.strip()}") from error


# Each table: its columns after `id`, as (name, kind). A column `<table>_id` refers to that table.
Table = tuple[str, tuple[tuple[str, str], ...]]
SQL_TRAIN: tuple[tuple[Table, ...], ...] = (
    (
        ("customers", (("name", "person"), ("email", "email"), ("city", "city"))),
        ("orders", (("customers_id", "ref"), ("ordered_on", "date"), ("status", "status"))),
        ("order_lines", (("orders_id", "ref"), ("quantity", "int"), ("unit_price", "money"))),
    ),
    (
        ("departments", (("title", "word"), ("budget", "money"))),
        ("employees", (("departments_id", "ref"), ("name", "person"), ("salary", "money"),
                       ("hired_on", "date"))),
        ("timesheets", (("employees_id", "ref"), ("worked_on", "date"), ("hours", "float"))),
    ),
    (
        ("authors", (("name", "person"), ("country", "country"))),
        ("books", (("authors_id", "ref"), ("title", "title"), ("published", "year"),
                   ("pages", "int"))),
        ("loans", (("books_id", "ref"), ("borrower", "person"), ("due_on", "date"))),
    ),
    (
        ("airports", (("code", "code"), ("city", "city"), ("country", "country"))),
        ("flights", (("airports_id", "ref"), ("flight_number", "code"), ("departs_at", "time"))),
        ("tickets", (("flights_id", "ref"), ("passenger", "person"), ("fare", "money"))),
    ),
    (
        ("students", (("name", "person"), ("enrolled_on", "date"), ("active", "bool"))),
        ("courses", (("title", "title"), ("credits", "int"))),
        ("grades", (("students_id", "ref"), ("courses_id", "ref"), ("score", "float"))),
    ),
    (
        ("accounts", (("owner", "person"), ("iban", "code"), ("balance", "money"))),
        ("transfers", (("accounts_id", "ref"), ("amount", "money"), ("sent_at", "time"),
                       ("status", "status"))),
    ),
    (
        ("users", (("login", "login"), ("email", "email"), ("created_at", "time"))),
        ("posts", (("users_id", "ref"), ("title", "title"), ("views", "int"))),
        ("comments", (("posts_id", "ref"), ("users_id", "ref"), ("body", "title"))),
    ),
    (
        ("artists", (("name", "person"), ("genre", "word"))),
        ("albums", (("artists_id", "ref"), ("title", "title"), ("released", "year"))),
        ("tracks", (("albums_id", "ref"), ("title", "title"), ("seconds", "int"))),
    ),
    (
        ("sensors", (("label", "code"), ("location", "city"), ("enabled", "bool"))),
        ("readings", (("sensors_id", "ref"), ("taken_at", "time"), ("value", "float"))),
    ),
    (
        ("suppliers", (("company", "word"), ("country", "country"))),
        ("products", (("suppliers_id", "ref"), ("sku", "code"), ("price", "money"),
                      ("in_stock", "int"))),
    ),
)  # fmt: skip
SQL_HELDOUT: tuple[tuple[Table, ...], ...] = (
    (
        ("doctors", (("name", "person"), ("specialty", "word"))),
        ("patients", (("name", "person"), ("born_on", "date"), ("city", "city"))),
        ("appointments", (("patients_id", "ref"), ("doctors_id", "ref"), ("starts_at", "time"),
                          ("cancelled", "bool"))),
    ),
    (
        ("hotels", (("name", "word"), ("city", "city"), ("stars", "int"))),
        ("rooms", (("hotels_id", "ref"), ("room_number", "int"), ("nightly_rate", "money"))),
        ("bookings", (("rooms_id", "ref"), ("guest", "person"), ("arrival", "date"))),
    ),
    (
        ("teams", (("name", "word"), ("founded", "year"))),
        ("players", (("teams_id", "ref"), ("name", "person"), ("goals", "int"))),
    ),
    (
        ("vehicles", (("plate", "code"), ("model", "word"), ("mileage", "int"))),
        ("repairs", (("vehicles_id", "ref"), ("repaired_on", "date"), ("cost", "money"),
                     ("description", "title"))),
    ),
)  # fmt: skip

SQL_TYPES = {
    "ref": "INTEGER NOT NULL", "person": "VARCHAR(80) NOT NULL", "email": "VARCHAR(120) UNIQUE",
    "city": "VARCHAR(60)", "country": "CHAR(2)", "date": "DATE NOT NULL", "time": "TIMESTAMP",
    "status": "VARCHAR(20) DEFAULT 'new'", "int": "INTEGER DEFAULT 0", "money": "NUMERIC(10, 2)",
    "float": "REAL", "year": "SMALLINT", "title": "TEXT", "word": "VARCHAR(40)", "code": "CHAR(8)",
    "bool": "BOOLEAN DEFAULT TRUE", "login": "VARCHAR(30) UNIQUE",
}  # fmt: skip
FIRST = [
    "Ada",
    "Boris",
    "Chloe",
    "Deniz",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mona",
    "Nils",
    "Olga",
]
LAST = [
    "Almeida",
    "Brandt",
    "Costa",
    "Dubois",
    "Eriksen",
    "Fischer",
    "Garcia",
    "Haddad",
    "Ito",
    "Jensen",
    "Kumar",
    "Lopez",
]
CITIES = [
    "Lisbon",
    "Oslo",
    "Kyoto",
    "Quito",
    "Nairobi",
    "Turin",
    "Boston",
    "Lyon",
    "Perth",
    "Gdansk",
    "Izmir",
    "Dakar",
]
WORDS = [
    "Northern",
    "Silver",
    "Granite",
    "Harbor",
    "Summit",
    "Cedar",
    "Atlas",
    "Orion",
    "Meadow",
    "Copper",
    "Falcon",
]
NOUNS = [
    "River",
    "Garden",
    "Engine",
    "Letter",
    "Window",
    "Theory",
    "Market",
    "Season",
    "Bridge",
    "Signal",
    "Archive",
]


def _sql_document(seed: str, themes: tuple[tuple[Table, ...], ...]) -> str:
    """One small database script: tables, rows, and queries over them."""
    draw = random.Random(seed)  # a string seed is hashed the same way in every process
    tables = draw.choice(themes)
    statements = [_create(draw, table, tables) for table in tables]
    statements += [_insert(draw, table) for table in tables]
    queries = [_select, _join, _group, _update, _delete, _index, _view, _subquery]
    statements += [draw.choice(queries)(draw, tables) for _ in range(draw.randint(3, 8))]
    kept = draw.sample(range(len(statements)), max(4, len(statements) * 3 // 4))
    text = "\n\n".join(statements[index] for index in sorted(kept))
    return (text.lower() if draw.random() < 0.15 else text) + "\n"


def _value(draw: random.Random, kind: str) -> str:
    """A random SQL literal."""
    if kind in ("ref", "int"):
        return str(draw.randint(1, 500))
    if kind == "money":
        return f"{draw.randint(5, 9000)}.{draw.randint(0, 99):02d}"
    if kind == "float":
        return f"{draw.uniform(0, 100):.1f}"
    if kind == "year":
        return str(draw.randint(1950, 2025))
    if kind == "bool":
        return draw.choice(["TRUE", "FALSE"])
    day = f"{draw.randint(2015, 2025)}-{draw.randint(1, 12):02d}-{draw.randint(1, 28):02d}"
    clock = f"{draw.randint(0, 23):02d}:{draw.randint(0, 59):02d}:00"
    first, last = draw.choice(FIRST), draw.choice(LAST)
    text = {
        "person": f"{first} {last}",
        "email": f"{first.lower()}.{last.lower()}@example.org",
        "login": f"{first.lower()}{draw.randint(1, 99)}",
        "city": draw.choice(CITIES),
        "country": draw.choice(["FR", "DE", "JP", "BR", "KE", "NO", "PT", "IT", "US", "IN"]),
        "status": draw.choice(["new", "paid", "shipped", "pending", "closed", "failed"]),
        "title": f"The {draw.choice(WORDS)} {draw.choice(NOUNS)}",
        "word": draw.choice(WORDS),
        "code": f"{draw.choice('ABCDEFGH')}{draw.choice('KLMNPQRS')}-{draw.randint(100, 9999)}",
        "date": day,
        "time": f"{day} {clock}",
    }
    return f"'{text[kind]}'"


def _create(draw: random.Random, table: Table, tables: tuple[Table, ...]) -> str:
    name, columns = table
    lines = ["    id INTEGER PRIMARY KEY"]
    lines += [f"    {column} {SQL_TYPES[kind]}" for column, kind in columns]
    for column, kind in columns:
        if kind == "ref":
            target = column.removesuffix("_id")
            rule = draw.choice(["", " ON DELETE CASCADE", " ON DELETE SET NULL"])
            lines.append(f"    FOREIGN KEY ({column}) REFERENCES {target} (id){rule}")
        elif kind in ("int", "money", "float") and draw.random() < 0.3:
            lines.append(f"    CHECK ({column} >= 0)")
    exists = draw.choice(["", "IF NOT EXISTS "])
    return f"CREATE TABLE {exists}{name} (\n" + ",\n".join(lines) + "\n);"


def _insert(draw: random.Random, table: Table) -> str:
    name, columns = table
    rows = [
        f"    ({row}, " + ", ".join(_value(draw, kind) for _, kind in columns) + ")"
        for row in range(1, draw.randint(3, 6))
    ]
    names = ", ".join(column for column, _ in columns)
    return f"INSERT INTO {name} (id, {names}) VALUES\n" + ",\n".join(rows) + ";"


def _condition(draw: random.Random, table: Table, prefix: str = "") -> str:
    column, kind = draw.choice(table[1])
    if kind in ("person", "title", "email", "word") and draw.random() < 0.5:
        return f"{prefix}{column} LIKE '{draw.choice('ABCDEFGHIJKLM')}%'"
    if kind in ("date", "time", "int", "money", "float", "year"):
        if draw.random() < 0.3:
            ends = [_value(draw, kind), _value(draw, kind)]
            low, high = sorted(
                ends, key=lambda end: (0.0, end) if "'" in end else (float(end), end)
            )
            return f"{prefix}{column} BETWEEN {low} AND {high}"
        return f"{prefix}{column} {draw.choice(['>', '<', '>=', '<='])} {_value(draw, kind)}"
    if draw.random() < 0.2:
        return f"{prefix}{column} IS NOT NULL"
    return f"{prefix}{column} = {_value(draw, kind)}"


def _select(draw: random.Random, tables: tuple[Table, ...]) -> str:
    name, columns = table = draw.choice(tables)
    names = ", ".join(column for column, _ in draw.sample(columns, draw.randint(1, len(columns))))
    order = f"\nORDER BY {draw.choice(columns)[0]}{draw.choice(['', ' DESC'])}"
    limit = f"\nLIMIT {draw.choice([5, 10, 20, 50])}" if draw.random() < 0.5 else ""
    both = f"\n  AND {_condition(draw, table)}" if draw.random() < 0.4 else ""
    return f"SELECT {names}\nFROM {name}\nWHERE {_condition(draw, table)}{both}{order}{limit};"


def _join(draw: random.Random, tables: tuple[Table, ...]) -> str:
    child, parent, column = _reference(draw, tables)
    a, b = parent[0][0], child[0][0] if child[0][0] != parent[0][0] else child[0][:2]
    own = draw.choice([name for name, kind in child[1] if kind != "ref"])
    other = draw.choice([name for name, kind in parent[1] if kind != "ref"])
    kind = draw.choice(["JOIN", "LEFT JOIN", "INNER JOIN"])
    return (
        f"SELECT {a}.{other}, {b}.{own}\nFROM {child[0]} {b}\n"
        f"{kind} {parent[0]} {a} ON {a}.id = {b}.{column}\n"
        f"WHERE {_condition(draw, child, b + '.')};"
    )


def _group(draw: random.Random, tables: tuple[Table, ...]) -> str:
    name, columns = draw.choice(tables)
    column = draw.choice(columns)[0]
    numbers = [other for other, k in columns if k in ("int", "money", "float")]
    total = (
        f"{draw.choice(['SUM', 'AVG', 'MAX'])}({draw.choice(numbers)})" if numbers else "COUNT(*)"
    )
    having = f"\nHAVING COUNT(*) > {draw.randint(1, 20)}" if draw.random() < 0.5 else ""
    tail = f"GROUP BY {column}{having}\nORDER BY total DESC;"
    return f"SELECT {column}, {total} AS total\nFROM {name}\n{tail}"


def _update(draw: random.Random, tables: tuple[Table, ...]) -> str:
    name, columns = table = draw.choice(tables)
    column, kind = draw.choice(columns)
    new = f"{column} * 1.{draw.randint(1, 9)}" if kind == "money" else _value(draw, kind)
    return f"UPDATE {name}\nSET {column} = {new}\nWHERE {_condition(draw, table)};"


def _delete(draw: random.Random, tables: tuple[Table, ...]) -> str:
    table = draw.choice(tables)
    return f"DELETE FROM {table[0]} WHERE {_condition(draw, table)};"


def _index(draw: random.Random, tables: tuple[Table, ...]) -> str:
    name, columns = draw.choice(tables)
    column = draw.choice(columns)[0]
    return f"CREATE {draw.choice(['', 'UNIQUE '])}INDEX idx_{name}_{column} ON {name} ({column});"


def _view(draw: random.Random, tables: tuple[Table, ...]) -> str:
    name = f"recent_{draw.choice(tables)[0]}"
    return f"CREATE VIEW {name} AS\n{_select(draw, tables)}"


def _subquery(draw: random.Random, tables: tuple[Table, ...]) -> str:
    child, parent, column = _reference(draw, tables)
    name = next(other for other, kind in parent[1] if kind != "ref")
    return (
        f"SELECT {name}\nFROM {parent[0]}\nWHERE id {draw.choice(['IN', 'NOT IN'])} (\n"
        f"    SELECT {column} FROM {child[0]} WHERE {_condition(draw, child)}\n);"
    )


def _reference(draw: random.Random, tables: tuple[Table, ...]) -> tuple[Table, Table, str]:
    """A table, one that it refers to, and the column that does."""
    named = {table[0]: table for table in tables}
    found = [
        (table, named[column.removesuffix("_id")], column)
        for table in tables
        for column, kind in table[1]
        if kind == "ref" and any(k != "ref" for _, k in table[1])
    ]
    return draw.choice(found)
