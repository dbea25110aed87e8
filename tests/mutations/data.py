"""Data: which tests look at a file, and the tokens that are changed in it."""

WEBDATASET = "tests/data/test_webdataset.py"
LOADER = "tests/data/test_loader.py"
DALI = "tests/data/test_dali.py"

TESTS = {
    "data/sources/given": ("tests/test_given.py", "kind or wrongly or bad or dictionaries"),
    "data/datasets": (
        "tests/data/test_datasets.py tests/data/test_same_data.py",
        "split or run or labels",
    ),
    "data/loader": (LOADER, "padded or share_of or killed or outlive"),
    "data/worker": (LOADER, "failure or unreadable or replaced or memory or eval_has"),
    "data/sources/webdataset": (WEBDATASET, "not workers and not remote"),
    "data/sources/records": (WEBDATASET, "not workers and not remote"),
    "data/sources/files": (
        f"tests/data/test_files.py {WEBDATASET}",
        "not workers and not remote and not memory",
    ),
    "data/sources/folder": ("tests/data/test_folder.py", ""),
    "data/sources/names": ("tests/data/test_folder.py", ""),
    "data/sources/npy": ("tests/data/test_npy.py", ""),
    "data/sources/lmdbs": ("tests/data/test_lmdbs.py", "not workers"),
    "data/sources/remote": ("tests/data/test_remote.py", ""),
    "data/sources/tables": ("tests/data/test_tables.py", "csv"),
    "data/sources/decode": ("tests/data/test_images.py", ""),
    "data/render/encoded": (DALI, "bomb or draws or exact or simclr"),
    "data/batch/ops": ("tests/data/test_batch_ops.py", "not run and not network and not vit"),
}

STREAMS = "tests/data/test_streams.py"
STREAM_SOURCES = "tests/data/test_stream_sources.py"
TESTS |= {
    "data/streams": (STREAMS, ""),
    "data/render/streams": (STREAMS, ""),
    "data/render/torchvision": (
        f"{STREAMS} tests/data/test_geometry.py",
        "share or places or over",
    ),
    "data/views/image": ("tests/data/test_geometry.py", "over"),
    "data/views/presets": ("tests/data/test_presets.py", "dinov2"),
    "data/views/streams": (STREAMS, ""),
    "data/sources/paired": (STREAM_SOURCES, "pair"),
    "data/sources/paths": (STREAM_SOURCES, "table"),
    "data/sources/reading": (STREAM_SOURCES, "read or pair"),
}

MUTATIONS = {  # function: (what stands in it or below, what it becomes)
    "data/render/streams.stream_seed": [("name == spec.primary", "name != spec.primary")],
    "data/render/torchvision._span": [("at * side / of", "at * of / side")],
    "data/render/torchvision.draw_views": [
        ("view.size / views.crops[view.over].size", "1.0"),
        ("shared(own, drawn[view.over]", "shared(own, drawn[0]"),
    ],
    "data/views/image._check_place": [('key != "within" and', 'key == "within" and')],
    "data/views/presets.dinov2": [("(0.0, 0.9)", "(1.0, 0.1)")],
    "data/render/torchvision.shared": [
        ("flip=other.flip", "flip=own.flip"),
        ("other.shift[0] * scale", "other.shift[0] / scale"),
    ],
    "data/views/streams.__post_init__": [
        ("if any(view.rand_augment", "if all(not view.rand_augment")
    ],
    "data/views/streams._placed": [("self.root(name)", "name")],
    "data/streams.chosen": [("has and not names", "not has and not names")],
    "data/streams.Joined": [("len(set(lengths.values())) > 1", "len(set(lengths.values())) > 2")],
    "data/sources/paired._part": [("[own[key] for key in order]", "[*own.values()]")],
    "data/sources/paired.unmatched": [("if not all(", "if not any(")],
    "data/sources/tables.classes_of": [('if "" in texts', "if False")],
    "data/sources/paths._check_files": [("if not cell or not", "if not cell and not")],
    "data/sources/reading.decode_values": [("if not torch.isfinite(found).all()", "if False")],
    "data/sources/reading.read_as": [
        ("if mode.startswith(_DEEP)", "if False"),
        ("if not mode", "if False"),
    ],
    "data/sources/given.item": [("len(own) != want", "len(own) < want"), ("if lost or", "if")],
    "data/sources/given.as_item": [
        ("x.transpose(2, 0, 1)", "x.transpose(2, 1, 0)"),
        ("(255 * x).round()", "(255 * x).floor()"),
        ("low >= 0 and high <= 1", "low >= 0 or high <= 1"),
        ("x.shape[0] not in (1, 3)", "x.shape[0] in (2, 4)"),
    ],
    "data/sources/given._labels": [("values.shape != (count,)", "values.ndim != 1")],
    "data/sources/webdataset._image": [
        ("if not plain]", "if plain]"),
        ("len(images) > 1", "len(images) > 2"),
        ("part.extension == chosen", "part.extension != chosen"),
    ],
    "data/sources/webdataset.parse_label": [
        ("else text or None", "else None"),
        ("type(label) is int", "type(label) is bool"),
    ],
    "data/sources/webdataset._label": [('("cls", "json")', '("txt", "json")')],
    "data/sources/webdataset._scanned": [("found[-1:]", "found[:1]"), ("> told.size", "< 0")],
    "data/sources/webdataset._joined": [
        ("if image is not None:", "if image is None:"),
        ("if image is None else None", "if image is not None else None"),
    ],
    "data/sources/webdataset._shard": [
        ("_by_last_dot(found) if last", "_by_last_dot(found) if not last"),
        ("< len(s)", "<= len(s)"),
        ("found[n]) for n, _", "found[0]) for n, _"),
    ],
    "data/sources/webdataset.own_split": [('return [f"{path}/train"', "return [path")],
    "data/sources/records.built": [("labels < 0", "labels < -1")],
    "data/sources/records._coded": [("| {-1: -1}", "| {-1: 0}"), ("last >= MOST", "last < MOST")],
    "data/sources/files.status": [
        ("and not stat.S_ISDIR", "and stat.S_ISDIR"),
    ],
    "data/sources/files.write_beside": [
        ("not head or own(head)", "head or own(head)"),
        ('else b"?"', 'else b""'),
    ],
    "data/sources/files.record": [
        ("<= size < MOST_BYTES", "<= size"),
        ("if of_the_machine", "if not of_the_machine"),
    ],
    "data/sources/folder._named": [("f.lower() == name", "f == name")],
    "data/sources/folder.split_folders": [
        ("len(folders) == 1", "len(folders) == 2"),
        ("f.lower() not in", "f.upper() not in"),
    ],
    "data/sources/folder.scan_folder": [
        ("None in images.folders]", "None not in images.folders]"),
        ("0 < len(plain) < len(parts)", "0 < len(plain) > len(parts)"),
    ],
    "data/sources/folder.scan_files": [("<= set(folders)", ">= set(folders)")],
    "data/sources/folder.walk": [
        ("(others is not None and not suffix)", "(others is None and not suffix)"),
        ("(suffix or _is_image", "(suffix and _is_image"),
        ("suffix in _OTHER_IMAGES", "suffix not in _OTHER_IMAGES"),
    ],
    "data/sources/folder._build": [
        ("map(printable, known)", "map(str, known)"),
        ("flat or None in folders", "flat and None in folders"),
    ],
    "data/sources/names.printable": [("backslashreplace", "replace")],
    "data/datasets.fingerprint": [
        ("len(split.train)", "len(split.test)"),
        ("part.name(int(i))", "part.name(0)"),
        ("[:16]", "[:0]"),
        ("part.labels.numpy()", "part.labels.numpy()[:0]"),
    ],
    "data/datasets.split_indices": [
        ("len(members)), 1)", "len(members)), 0)"),
        ("len(members) - 1", "len(members)"),
    ],
    "data/sources/npy._read": [
        ("except MemoryError", "except OSError"),
        ('not in "uif"', 'not in "uifU"'),
    ],
    "data/sources/lmdbs.encoded": [("except lmdb.Error", "except OSError")],
    "data/sources/lmdbs.open": [("except _lmdb().Error", "except OSError")],
    "data/sources/lmdbs._check_whole": [("have < want", "have > want")],
    "data/sources/lmdbs._numbered": [("if plain else None", "if not plain else None")],
    "data/sources/remote.filesystem": [("except Exception as", "except OSError as")],
    "data/sources/remote._sound": [
        ("(ValueError, TypeError, LookupError)", "(KeyError, IndexError)")
    ],
    "data/sources/remote._final_error": [
        ("code in (401, 403)", "code in (401, 402)"),
        ("(408, 425, 429)", "(408, 425)"),
        ("code == 416", "code == 417"),
    ],
    "data/sources/remote.read": [("len(data) > size", "len(data) > size**9")],
    "data/sources/tables.read_csv": [
        ("if all(map(_is_number, header))", "if False and all(map(_is_number, header))"),
    ],
    "data/sources/tables._is_number": [("bool(cell) and", "bool(cell) or")],
    "data/sources/decode.*": [
        ("errno.ESTALE)", "errno.EIO)"),
        ("isinstance(error, MemoryError) or", "isinstance(error, MemoryError) and"),
    ],
    "data/sources/decode._pixels": [
        ("image.width * image.height", "image.width + image.height"),
        ('== "EPS"', '== "PSD"'),
    ],
    "data/sources/decode._converted": [
        ('image.mode == "F"', 'image.mode == "I"'),
        ("min(top + rows, H)", "top + rows"),
        ("top : top + rows", "top : top + rows + 1"),
    ],
    "data/loader._watched": [
        ('+ len(batch["bad"])', '+ 0 * len(batch["bad"])'),
        ("bad > limit * drawn", "bad > 2 * limit * drawn"),
    ],
    "data/loader._told": [
        ("if worker.exitcode]", "if not worker.exitcode]"),
        ("if code < 0", "if code > 0"),
    ],
    "data/loader._outlive_signals": [
        ("signal.SIGINT,", "signal.SIGTERM,"),
        ("signal.SIGUSR1,", "signal.SIGTERM,"),
        ("signal.SIGHUP)", "signal.SIGTERM)"),
    ],
    "data/loader._padding": [(">= end - first", "> end - first")],
    "data/loader._Steps": [("extra, extra + share", "extra + 1, extra + 1 + share")],
    "data/loader.stretch": [("count * self.rank //", "self.batch_size * self.rank //")],
    "data/loader.steps_per_epoch": [("rest > 0", "rest < 0")],
    "data/worker.__getitems__": [("(OSError, MemoryError)", "(OSError, KeyError)")],
    "data/worker.machine_advice": [("code == errno.ENOMEM", "code == errno.ESTALE")],
    "data/worker._readable": [
        ("return i, item", "return index, item"),
        ("extend(tried)", "extend(tried[:1])"),
    ],
    "data/worker.mostly_bad": [("[:3]", "[:2]")],
    "data/worker.Parcel": [
        ("except (OSError, RuntimeError) as error:  #", "except OSError as error:  #"),
    ],
    "data/worker.opened": [("except (OSError, RuntimeError)", "except RuntimeError")],
    "data/worker.EvalFetch": [("used.append(i)", "used.append(0)")],
    "data/render/encoded.encoded_item": [
        ("None if careful", "None if not careful"),
    ],
    "data/render/encoded.union": [("min(p.left", "max(p.left")],
    "data/render/encoded._from_output": [
        ("- a * x - d * y", "- a * x + d * y"),
        ("1 - 2 * p.flip_vertical", "1 - 2 * p.flip"),
    ],
    "data/batch/ops.Mixup": [
        ('self.per == "sample"', 'self.per == "batch"'),
        ("low + (high - low)", "high + (high - low)"),
    ],
    "data/batch/ops.Noise": [("self.gaussian * draws", "draws")],
    "data/batch/ops.LowFrequency": [
        ("progress < until", "progress <= until"),
    ],
    "data/batch/ops.check_batch_ops": [("v >= len(shapes)", "v > len(shapes)")],
    "data/batch/ops.apply_batch_ops": [("keys[:, v]", "keys[:, 0]"), ("(k + 1)", "1")],
    "data/batch/ops._on_pixels": [("- mean) / std", "- mean) * std")],
}
