"""Images with captions in the usual formats: each function returns (list of Row, read)."""
import csv
import glob
import json
import os
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from data import drawn
from runtime import store
from runtime.cli import UserError, extra, is_text

# which of these can be read depends on how Pillow was built; of a moving picture, it is the first frame
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# datasets and webdataset are imported where they are used: each costs a second or two
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")      # the first of these that is there
TEXT_SUFFIXES = (".txt", ".caption")            # likewise, of files beside an image
NO_CAPTION = "has no caption; "                 # begins the problem that --caption solves


class Row(NamedTuple):
    """A stored image: its name in a message, where read() finds it, its caption, and why it cannot
    be used ("": it can)."""
    name: str
    where: tuple | None
    caption: str = ""
    problem: str = ""


# ---- formats: each function returns (list of Row, read) ----------------------------------------------------


def find_rows(data, image_column="", caption_column=""):
    """The rows of whatever --data names: a folder, a file, a brace or glob pattern of files, or a
    dataset on the hub. A Row that is listed n times is to be drawn n times as often."""
    columns, path = (image_column, caption_column), Path(data)
    suffix = path.suffix.lower()
    remedy = ("give a folder of images with same-name .txt, .caption or .json captions or a metadata.jsonl, "
              "tar shards, parquet files, "
              f"user/name on the Hugging Face hub, or {' or '.join(drawn.SOURCES)}")
    if path.is_dir():
        return rows_below(data, *columns)
    if re.match(r"pipe:|[a-z][a-z0-9+.-]*://", data, re.I):
        raise UserError(f"--data {data}: an address, but data is read from the disk; download it, or "
                        f"{remedy}")
    if suffix in (".tar", ".parquet"):
        files = [path] if path.exists() else expand(data)
        if any(file.exists() for file in files):
            if suffix == ".tar":
                return tar_rows(files, *columns)
            return table_rows(data,
                              lambda datasets: datasets.Dataset.from_parquet([str(file) for file in files]),
                              *columns)
    elif suffix in RECORD_SUFFIXES and path.is_file():
        return metadata_rows(path, *columns)
    # user/name; but a/b where there is a folder a is a typing error, not a reason to query the network
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data) and not path.exists() and not path.parent.exists():
        return table_rows(data, lambda datasets: datasets.load_dataset(data, split="train"), *columns)
    if path.exists():
        raise UserError(f"--data {data}: a file of no kind that is read here; {remedy}")
    if re.search(r"[*?[{]", data):
        known = suffix in (".tar", ".parquet")
        what = "matches no file" if known else "a pattern, which only .tar and .parquet files can have"
        raise UserError(f"--data {data}: {what}; {remedy}")
    raise UserError(f"--data {data}: no such folder or file; {remedy}")


def rows_below(data, image_column, caption_column):
    """The rows of a folder, which holds images of one kind: COCO's, loose files, tar shards or
    tables."""
    columns, path = (image_column, caption_column), Path(data)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return table_rows(data, lambda datasets: datasets.load_from_disk(data), *columns)
    if any(path.glob("annotations/captions_*.json")):
        return coco_rows(path, *columns)
    files = files_below(path)
    images, tars, tables = ([file for file in files if file.suffix.lower() in suffixes]
                            for suffixes in (IMAGE_SUFFIXES, (".tar",), (".parquet",)))
    if (images or tars) and tables and not holds_images(tables[0]):
        tables = []  # img2dataset leaves a table of addresses beside a shard
    there = [f"{len(found)} {what} ({found[0].relative_to(path)}{', ...' * (len(found) > 1)})"
             for found, what in (
        (images, "image files"), (tars, "tar files"), (tables, "tables with images")) if found]
    if len(there) > 1:
        raise UserError(f"--data {data}: holds {' and '.join(there)}; move away what is not meant, or give a "
                        f"pattern such as '{data}/*.tar'")
    if tars:
        return tar_rows(tars, *columns)
    for metadata in (path / f"metadata.{kind}" for kind in ("jsonl", "csv", "tsv")):
        if metadata.exists():
            return metadata_rows(metadata, *columns)
    linked = [file for file in tables
              if any(here.is_symlink() for here in file.parents if path in here.parents)]
    if linked:                                               # load_dataset would leave them out in silence
        raise UserError(f"--data {data}: {linked[0].relative_to(path)} is behind a link to a folder; give "
                        f"the folder it leads to, or a pattern such as '{linked[0].parent}/*.parquet'")
    if tables:  # load_dataset knows which of them are train, which test
        return table_rows(data, lambda datasets: datasets.load_dataset(data, split="train"), *columns)
    return folder_rows(path, files, *columns)


def files_below(folder):
    """Every file anywhere below a folder, sorted. Links to folders are entered, but no folder
    twice; hidden names do not count.  Raises UserError on a folder that cannot be opened."""
    def refuse(error):
        raise UserError(f"--data {folder}: {error.filename} cannot be opened ({error.strerror}); allow it or "
                        "move it away") from error
    entered, files = set(), []
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(here) in entered:                # a second link to it, or one that leads back up
            folders.clear()
            continue
        entered.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


def expand(pattern):
    """The files of a pattern such as shards/{0000..0010}.tar or shards/*.tar.
    One that is not there stays in the list."""
    expand_urls = extra(f"--data {pattern}", "webdataset", "data").shardlists.expand_urls
    return [Path(file) for piece in expand_urls(pattern) for file in sorted(glob.glob(piece)) or [piece]]


def read_span(where):
    """The bytes of where = (path, offset, size). The file is opened each time: it works in any
    thread and after a fork."""
    path, offset, size = where
    with open(path, "rb") as file:
        file.seek(offset)
        return whole(file.read(size), size)


def whole(content, size):
    if len(content) < size:
        raise OSError(f"{len(content)} bytes of {size}")
    return content


def clean(caption):
    """A caption as a table or JSON holds it, as text: of several the first, "" for what is not
    text, or holds half a character."""
    caption = next(iter(caption), "") if isinstance(caption, (list, tuple)) else caption
    return caption.strip() if isinstance(caption, str) and is_text(caption) else ""


def choose_column(source, columns, wanted):
    """The caption column: the wanted one, or the first of CAPTION_COLUMNS that is there, in upper
    or lower case.
    source: the option and its value, for the message. columns: names.  Raises UserError."""
    for column in [wanted] if wanted else CAPTION_COLUMNS:
        for found in columns:
            if found == column or not wanted and found.lower() == column:
                return found
    if not columns:
        raise UserError(f"{source}: no entry of it has columns; in a .jsonl each line is an object in braces")
    raise UserError(f"{source}: no caption column {wanted or 'known'}; name one of {', '.join(columns)} with "
                    "--caption-column")


def row_of(name, where, caption, place):
    """The Row of an image; without caption, its problem says that one can be written into place."""
    return Row(name, where, caption,
               "" if caption else f"{NO_CAPTION}write one into {place} or give --caption TEXT")


def fill(rows, caption):
    """The rows, those without a caption with this one. "": as they are."""
    return [row._replace(caption=caption, problem="")
            if caption and row.problem.startswith(NO_CAPTION) else row for row in rows]


def captioned_row(name, where, stem, there, read, wanted):
    """The Row of an image whose caption is STEM.txt, STEM.caption or, under one of CAPTION_COLUMNS,
    in STEM.json; under `wanted` if that is given. there: names that exist, suffix in lower case ->
    what read() turns into bytes."""
    text, record = "", {}
    try:
        for suffix in () if wanted else TEXT_SUFFIXES:
            if not text and stem + suffix in there:
                text = read(there[stem + suffix]).decode("utf-8-sig").strip()
        if not text and stem + ".json" in there:
            record = store.parse_object(read(there[stem + ".json"]).decode("utf-8-sig"))
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        return Row(name, where, problem=f"or its caption cannot be read ({error}); replace or remove it")
    candidates = map(clean, map(record.get, [wanted] if wanted else CAPTION_COLUMNS))
    caption = next(filter(None, [text, *candidates]), "")
    return row_of(name, where, caption, f"{stem}.json, {wanted}" if wanted else f"{stem}.txt")


def lower_suffix(name):
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def folder_rows(folder, files, image_column, caption_column):
    """Images anywhere below a folder, each with its caption in a .txt, .caption or .json of the
    same name. A caption alone has lost its image, and is a problem; any other file is ignored.
    Of a folder N_name in it, as kohya's scripts have them, every image is drawn N times as often,
    and without a caption of its own has name for one."""
    if image_column:
        raise UserError(f"--image-column {image_column}: {folder} holds files and has no columns; leave it "
                        "out")
    there = {lower_suffix(str(file.relative_to(folder))): file for file in files}
    stems, rows = {os.path.splitext(name)[0] for name in there if name.endswith(IMAGE_SUFFIXES)}, []
    for file in files if stems else ():
        name = str(file.relative_to(folder))
        stem, suffix = os.path.splitext(lower_suffix(name))
        if not file.exists():
            rows.append(Row(name, None, problem="is a link to nothing; restore what it names or remove it"))
        elif suffix in IMAGE_SUFFIXES:
            where = (str(file), 0, file.stat().st_size)
            row = captioned_row(name, where, stem, there, Path.read_bytes, caption_column)
            repeats, named = kohya(name)
            if not repeats:
                row = row._replace(problem="is in a folder N_name to be repeated N = 0 times; rename it")
            rows += fill([row], named) * max(repeats, 1)
        elif suffix in TEXT_SUFFIXES and stem not in stems:
            rows.append(Row(name, None, problem="is the caption of no image; add its image or move it away"))
    return rows, read_span


def kohya(name):
    """(repeats, caption) that the first folder of a path says: (10, "red fox") of
    "10_red fox/a.png"; (1, "") of any other."""
    found = re.match(r"(\d+)_([^/\\]*\S)\s*[/\\]", name)
    return (int(found[1]), clean(found[2])) if found else (1, "")


RECORD_SUFFIXES = (".csv", ".tsv", ".jsonl")


def read_records(path):
    """The entries of a .csv, .tsv or .jsonl as dicts; {} for a line that is no JSON object.
    Raises OSError, UnicodeDecodeError, csv.Error."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            return [store.parse_object(line) for line in file if line.strip()]
        # strict: a quote that is never closed is an error, not one long entry
        records = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    for i, record in enumerate(records, 1):
        if any(record.pop(None, ())):                      # DictReader's name for what no column is left for
            raise csv.Error(f"entry {i} has more cells than the header; put a text that holds {delimiter!r} "
                            "in double quotes")
    return records


def columns_of(records):
    return list(dict.fromkeys(key for record in records for key in record if key))


def coco_captions(folder, split):
    """FOLDER/annotations/captions_SPLIT.json as COCO is distributed.  Returns: {image id: file
    name} and {image id:
    [(annotation id, caption), ...]}, both in the file's order; an image without captions is in the
    first alone.
    Raises UserError."""
    annotations = Path(folder) / "annotations" / f"captions_{split}.json"
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        names, found = {image["id"]: os.fspath(image["file_name"]) for image in content["images"]}, {}
        for annotation in content["annotations"]:
            if annotation["image_id"] in names:
                caption = (annotation["id"], clean(annotation["caption"].strip()))
                found.setdefault(annotation["image_id"], []).append(caption)
    except OSError as error:
        raise UserError(f"--data {folder}: annotations/{annotations.name} cannot be read ({error.strerror}); "
                        f"give the folder that holds COCO's annotations and {split}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--data {folder}: annotations/{annotations.name} is not a captions file of COCO "
                        f"({type(error).__name__}: {error}); fetch it again") from error
    return names, found


def coco_rows(folder, image_column, caption_column):
    """COCO as it is distributed: every image of the newest training split that is there, or else of
    the newest other one, with its first caption."""
    if image_column or caption_column:
        raise UserError(f"--image-column / --caption-column: {folder} is COCO and has no columns; leave them "
                        "out")
    splits = [file.stem.removeprefix("captions_") for file in folder.glob("annotations/captions_*.json")]
    there = [split for split in splits if (folder / split).is_dir()]
    if not there:
        raise UserError(f"--data {folder}: its annotations are COCO's, but {' or '.join(sorted(splits))} is "
                        "not beside them; unpack the images there")
    split, rows = max(there, key=lambda split: (split.startswith("train"), split)), []
    names, captions = coco_captions(folder, split)
    for image, name in names.items():
        file, caption = folder / split / name, captions.get(image, [(0, "")])[0][1]
        if not file.is_file():
            missing = "is named in its annotations but is not there; fetch it again"
            rows.append(Row(f"{split}/{name}", None, problem=missing))
        else:
            rows.append(row_of(f"{split}/{name}", (str(file), 0, file.stat().st_size), caption,
                               f"captions_{split}.json"))
    return rows, read_span


def metadata_rows(metadata, image_column, caption_column):
    """Images that a metadata.jsonl, .csv or .tsv names, in its order: the imagefolder layout of
    Hugging Face. Read here, not by datasets, which takes folders named test for a split and stops
    at the first file that is missing."""
    folder, image_column = metadata.parent, image_column or "file_name"
    try:
        records = read_records(metadata)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data {folder}: {metadata.name} cannot be read ({error}); replace it") from error
    column = choose_column(f"--data {folder}", columns_of(records), caption_column) if records else ""
    rows = []
    for i, record in enumerate(records, 1):
        name = record.get(image_column)
        if not name or not isinstance(name, str):
            rows.append(Row(f"{metadata.name} entry {i}", None, problem=f"names no image in {image_column}; "
                                                                        "fix or remove it"))
        elif not os.path.isfile(folder / name):           # Path's raises on a name that is too long
            rows.append(Row(name, None, problem=f"is named in {metadata.name} but is not there; add it or "
                                                "remove its entry"))
        else:
            rows.append(row_of(name, (str(folder / name), 0, (folder / name).stat().st_size),
                               clean(record.get(column)), f"{metadata.name}, {column}"))
    return rows, read_span


def tar_rows(shards, image_column, caption_column):
    """WebDataset shards: an image member and, of the same stem, a .txt or .caption with the caption or a
    .json with it under one of CAPTION_COLUMNS (or caption_column), in any order. Headers and captions are
    read once; an image is later read from its offset."""
    suffixes, rows = (f".{image_column.lower()}",) if image_column else IMAGE_SUFFIXES, []
    for shard in tqdm(shards, desc="indexing shards", disable=len(shards) < 10):
        there = {}                                               # name, its suffix in lower case -> header
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    name = lower_suffix(str(PurePosixPath(member.name)))
                    if member.isdir() or any(part.startswith(".") for part in PurePosixPath(name).parts):
                        continue
                    if name in there:
                        rows.append(Row(f"{shard.name}: {member.name}", None, problem="is there twice; keep "
                                                                                      "one"))
                    elif not member.isreg():
                        rows.append(Row(f"{shard.name}: {member.name}", None, problem="is a link; store the "
                                                                                      "file itself"))
                    else:
                        there[name] = member
                tar.fileobj.seek(tar.offset)
                if any(block.strip(b"\0") for block in iter(lambda: tar.fileobj.read(2 ** 20), b"")):
                    # tarfile takes a truncated header for the end
                    raise tarfile.ReadError("a truncated header, or another archive behind the first")
        except (OSError, ValueError, tarfile.TarError) as error:
            rows.append(Row(shard.name, None, problem=f"cannot be read to its end ({error}); fetch it again"))
        if there:
            with open(shard, "rb") as file:
                def read(member):
                    file.seek(member.offset_data)
                    return whole(file.read(member.size), member.size)
                rows += shard_rows(shard, there, read, suffixes, caption_column)
    return rows, read_span


def shard_rows(shard, there, read, suffixes, caption_column):
    """The rows of one shard. An image is one by its last suffix; of one stem, the first of
    suffixes. But NAME.mask.png beside NAME.jpg is a part of that sample, as in webdataset, unless
    it has a caption of its own."""
    def key(stem):
        folder, _, base = stem.rpartition("/")
        return f"{folder}/{base.split('.')[0]}".lstrip("/")
    stems, rows = {}, []
    for name in there:
        suffix = next((suffix for suffix in suffixes if name.lower().endswith(suffix)), None)
        if suffix:
            stems.setdefault(name[:-len(suffix)], {})[suffix] = there[name]
    for stem, found in stems.items():
        own_caption = any(stem + suffix in there for suffix in (*TEXT_SUFFIXES, ".json"))
        if key(stem) == stem or key(stem) not in stems or own_caption:
            image = found[min(found, key=suffixes.index)]
            where = (str(shard), image.offset_data, image.size)
            rows.append(captioned_row(f"{shard.name}: {image.name}", where, stem, there, read,
                                      caption_column))
    for name in there:
        stem, suffix = os.path.splitext(name)
        if suffix in TEXT_SUFFIXES and stem not in stems and key(stem) not in stems:
            lost = f"has no image ({', '.join(suffixes)}); add it or remove the caption"
            rows.append(Row(f"{shard.name}: {name}", None, problem=lost))
    return rows


def holds_images(parquet):
    """Whether a parquet file has a column of bytes, plain or in a struct {bytes, ...}, as images
    are stored."""
    pyarrow = extra(f"--data {parquet.parent}", "pyarrow", "data")
    extra(f"--data {parquet.parent}", "pyarrow.parquet", "data")
    try:
        types = pyarrow.parquet.read_schema(parquet).types
    except (OSError, ValueError) as error:
        raise UserError(f"--data {parquet.parent}: {parquet.name} cannot be read ({error}); fetch it again "
                        "or move it away") from error
    return any(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
               or pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 for kind in types)


def table_rows(data, load, image_column, caption_column):
    """A Hugging Face dataset; load(datasets) returns it. Rows are read through memory-mapped Arrow
    files, which datasets makes of parquet in its own cache ($HF_DATASETS_CACHE).
    No code from the hub is run: from version 4 on, datasets cannot."""
    datasets = extra(f"--data {data}", "datasets", "data")
    try:
        table = load(datasets)
        if isinstance(table, datasets.DatasetDict):
            table = table["train"]
    except Exception as error:  # offline, unknown, private, no such split, truncated: each has its own class
        raise UserError(f"--data {data}: cannot be opened ({type(error).__name__}: {error}); give a dataset "
                        "with a train split") from error
    # images by their type, or else plain bytes if there is one column of them
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    plain = [name for name, feature in table.features.items() if isinstance(feature, dict) and
             "bytes" in feature
             or getattr(feature, "dtype", "") in ("binary", "large_binary")]
    found = [image_column] if image_column else typed[:1] or plain
    if len(found) != 1 or found[0] not in table.column_names:
        what = "several columns of bytes" if len(found) > 1 else f"no column {image_column or 'of images'}"
        names = plain if len(found) > 1 else table.column_names
        raise UserError(f"--data {data}: {what}; name one of {', '.join(names)} with --image-column")
    image_column = found[0]
    caption_column = choose_column(f"--data {data}", table.column_names, caption_column)
    try:
        images = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--data {data}: the column {image_column} holds no images; name another with "
                        "--image-column") from error

    def read(where):
        cell = images[where[0]][image_column] or {"bytes": None, "path": None}
        if not cell["bytes"] and not cell["path"]:
            raise ValueError("an empty cell")
        return cell["bytes"] or Path(cell["path"]).read_bytes()
    captions, nbytes = [clean(caption) for caption in table[caption_column][:]], table.data.nbytes
    return [row_of(f"row {i}", (i, nbytes), caption, f"its column {caption_column}")
            for i, caption in enumerate(captions)], read
