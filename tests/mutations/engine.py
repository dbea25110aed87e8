"""The engine: which tests look at a file, and the tokens that are changed in it."""

ENGINE = "tests/engine/test_engine.py"
STATES = "tests/engine/test_states.py"

TESTS = {
    "engine/checkpoint": (
        "tests/train/test_damage.py",
        "executes or whole_and_of or is_code or newest_and_the_best or directory_in"
        " or reader_that_dies or of_two_processes",
    ),
    "engine/encoders": (
        "tests/engine/test_tensor_files.py tests/test_cli.py",
        "by_its_name or several",
    ),
    "engine/tensor_files": ("tests/engine/test_tensor_files.py", ""),
    "engine/verbs": ("tests/engine/test_engine.py", "to_the_rank"),
    "engine/states": ("tests/engine/test_states.py", ""),
    "engine/shards": ("tests/engine/test_states.py", "ranges"),
    "engine/fragments": (f"{ENGINE} {STATES}", "zero_3_keeps_whole or that_is_cut or moves_bet"),
    "engine/networks": (
        "tests/train/test_frozen.py tests/train/test_damage.py",
        "stays_as or resumes_and or its_step",
    ),
    "engine/engine": (
        f"{ENGINE} tests/engine/test_large_batch.py tests/train/test_train.py tests/test_given.py",
        "wrong_is_told or not_finite or merged_last or one_process or as_one or of_one or divide"
        " or micro_batches or moves_the or padding or to_the_rank or without_a_loss or one_step"
        " or of_the_whole or above_a_limit or skipped_step_changes or stage_0 or same_at_every"
        " or tf32",
    ),
    "engine/norms": (ENGINE, "above_a_limit"),
    "engine/zero": (
        ENGINE,
        "of_zero or fit_the_model or cannot_do or reaches_deepspeed or merged_last",
    ),
    "engine/breakdown": (ENGINE, "by_part"),
    "engine/blocks": (ENGINE, "is_tuned or checkpointing or recomputed or compile"),
    "engine/large_batch": ("tests/engine/test_large_batch.py", ""),
    "engine/launch": (ENGINE, "launchers or tasks or wrong_gradients"),
    "engine/peers": (
        "tests/engine/test_peers.py tests/engine/test_watchdog.py",
        "closed_connection or asked_to_stop or hang_end or does_not_answer or waited_for",
    ),
    "engine/watchdog": (
        "tests/engine/test_watchdog.py",
        "time_to_save or is_named or single or waited_for",
    ),
    "engine/groups": ("tests/engine/test_optim.py", "not slices and not differ"),
    "engine/clipping": ("tests/engine/test_clipping.py", ""),
    "schedules/config": (
        "tests/test_schedules.py tests/engine/test_optim.py",
        "warms_up or leaves_out or does_not_fit or wastes",
    ),
    "engine/optim": ("tests/engine/test_optim.py", "not slices and not differ"),
    "engine/layerwise": ("tests/engine/test_layerwise.py", "not ranks and not resumed"),
}

MUTATIONS = {  # place: (what stands in it or below, what it becomes)
    "engine/peers.hear": [("+ came).split", ").split"), ("and rest != _BYE", "or rest != _BYE")],
    "engine/peers.act": [
        ("heart.asked_to_stop = True", "heart.asked_to_stop"),
        ('self.tell({"is": heart.status()})', "heart.status()"),
    ],
    "engine/peers.tick": [
        ("self.passed_on = heart.asked_to_stop", "self.passed_on = False"),
        ("(heart.late() or self.late)", "False"),
    ],
    "engine/peers.judge": [
        ("< len(self.answers) and now", "< len(self.answers) or now"),
        ('if all(said["late"]', 'if any(said["late"]'),
        ('self.tell({"verdict": sentence})', "sentence"),
    ],
    "engine/watchdog.paused": [('place, self.place = self.place, ""', "place = self.place")],
    "engine/watchdog.idle": [("now - self.looked > _GAP", "False")],
    "engine/watchdog.late": [
        ("DATA: 2 * self.limit", "DATA: self.limit"),
        ("max(self.limit, _LEAST_SAVE)", "self.limit"),
    ],
    "engine/watchdog.verdict": [
        ("and len(busy) < len(heard)", "and True"),
        ("elif len(slow) < len(heard)", "elif False"),
        ("if silent:", "if False:"),
    ],
    "engine/watchdog.end": [("os._exit(EXIT)", "os._exit(1)"), ("child.kill()", "child")],
    "engine/engine._agree": [
        ("flags[2] > self._limits.loss", "loss > self._limits.loss"),
        ("loss / distributed.world_size()", "loss"),
        ("finite & ~spike", "finite"),
    ],
    "engine/engine._finish": [
        ("step.spike = limits.norm < step.norm", "step.spike = 0 < step.norm"),
        ("if step.spike or not step.finite:", "if not step.finite:"),
        ("(step.applied or step.spike)", "step.applied"),
        ("self._flags[0] == 0", "self._flags[0] != 0"),
        ("finite and (step.applied", "finite or (step.applied"),
        ("spike or not step.finite:", "spike:"),
        ("if norms and not step.spike:", "if False:"),
        ("self.optim.clip, norm)", "self.optim.clip, 2 * norm)"),
    ],
    "engine/norms.norm_limited": [("norms[-1] > limit", "False")],
    "engine/checkpoint._undisturbed": [("signal.SIG_DFL", "signal.getsignal(signal.SIGCHLD)")],
    "engine/checkpoint.load": [
        ('get("format", 1) != FORMAT', 'get("format", 2) > FORMAT'),
        ('if trainer["world"] == world:', 'if trainer["world"]:'),
        ("seed, trainer", "0, trainer"),
    ],
    "engine/checkpoint.names": [("reverse=True", "reverse=False")],
    "engine/checkpoint.check": [('("best", "latest")', '("best", "best")')],
    "engine/checkpoint._prune": [
        ("names()[: self", "names()[0 : 2 * self"),
        ("if best.is_file():", "if best.is_dir():"),
        ("if name not in keep", "if name in keep"),
    ],
    "engine/checkpoint.damaged": [
        ("AttributeError, RecursionError", "AttributeError"),
        ("KeyError, TypeError", "KeyError"),
        ("type(step) is not int or", "False or"),
        ('path.name != f"step', 'path.name == f"step'),
        ("if f.is_symlink() or not f.is_dir()", "if f.is_file()"),
        ('- {"manifest.json", *sums}', '- {"manifest.json", *there}'),
        ("|= {*named(file, sums)}", "|= set()"),
        ("if wanted - sums.keys():", "if False:"),
        ("if not old:", "if old:"),
        ("if not 0 < world < len(sums):", "if False:"),
        ("if name not in there:", "if name in ():"),
        ("not (old and _OLD", "not (_OLD"),
        ("if file.is_symlink() or not", "if not"),
        ("st_size != size", "st_size < 0"),
        ("_sha256(file) != checksum", "_sha256(file) is checksum"),
    ],
    "engine/zero.check_zero": [
        ("stage not in stages", "stage == 0"),
        ('precision != "bf16"', 'precision == "fp16"'),
        ("if name in raw.get", "if name not in raw.get"),
        ('accumulation_dtype == "fp32"', 'accumulation_dtype == "bf16"'),
    ],
    "engine/zero.runtime_problem": [
        ("world % zero.partition_size", "world < zero.partition_size"),
        ('device.type != "cuda"', 'device.type == "cuda"'),
    ],
    "engine/zero.deepspeed_keys": [
        ("cuda and world > 1 and", "cuda and"),
        ("(stage > 1 or parts == 1)", "True"),
        ("min(trained, OVERLAPPED if", "min(trained, WHOLE_MODEL if"),
        ('["memory_efficient_linear"] = False', '["memory_efficient_linear"] = True'),
        ("keys[names[0]] = value", "keys[names[0]] = 1"),
        ('"grad_accum_dtype": zero', '"grad_accum_dtypes": zero'),
    ],
    "engine/blocks.fetched_as_one": [("lambda parameter: False", "is_leaf")],
    "engine/blocks.recompute": [
        ("if not _has_norms(block)]", "]"),
        ('if how == "selective" else {}', "if how is True else {}"),
        ("blocks_of(method) if", "blocks_of(method.encoder) if"),
    ],
    "engine/blocks.compile_blocks": [("torch.compile(block.forward)", "block.forward")],
    "engine/engine.set_tf32": [('"high" if wanted', '"highest" if wanted')],
    "engine/breakdown.begin": [("between=True", "between=False")],
    "engine/breakdown._mark": [("self._stack[-1]", "self._stack[0]")],
    "engine/launch.check_version": [("< LEAST", "> LEAST")],
    "engine/networks.networks_of": [("or not all(map(is_network, found))", "or False")],
    "engine/networks.encoder_files": [("if not frozen]", "if True]")],
    "engine/networks.other_frozen": [("now.get(name, saved[name]) != saved[name]", "False")],
    "engine/encoders._saved": [
        ("if name and name not in networks", "if name in networks"),
        ("name = name or next", "name = next"),
    ],
    "engine/engine.encoder_parts": [("name or next(", "next(")],
    "engine/verbs.encoder_state": [("if kept:", "if True:")],
    "engine/checkpoint._write_encoder": [
        ("for _ in coming", "for _ in ()"),
        ("not torch.isfinite(whole).all()", "False"),
    ],
    "engine/encoders.weights": [("weights |= load_file", "weights = load_file")],
    "engine/tensor_files.in_order": [("-kinds", "kinds")],
    "engine/tensor_files.write_split": [
        ("> LARGEST", "> 2 * LARGEST"),
        ("in zip(names, files, strict=True) for key", "in zip(names[1:], files) for key"),
    ],
    "engine/tensor_files.files_of": [("{5}}-of-(", "{4}}-of-(")],
    "engine/tensor_files.named": [("[*files, _index(name)]", "files")],
    "engine/checkpoint._unreadable": [(", readable)", ", str)")],
    "engine/checkpoint._load_rng": [("weights_only=True", "weights_only=False")],
    "engine/states.check_offloaded": [('== (key == "device")', '== (key != "device")')],
    "engine/states._pieces": [
        ("masters.get(parameter, pieces.piece(parameter))", "pieces.piece(parameter)"),
        ("map(_share, held.pieces) if whole", "held.pieces if whole"),
    ],
    "engine/states.read": [
        ("            follow_masters(self.ds)", "            pass"),
        ("buffer.copy_(", "buffer.equal("),
        ("setattr(self.ds, name,", "print(self.ds, name,"),
    ],
    "engine/states._read_states": [
        ("if value != states[other][field]", "if False"),
        ("there = [piece for piece in held.pieces if", "there = [piece for piece in [] if"),
        ("            now[field] = value", "            pass"),
    ],
    "engine/states._read_groups": [
        ("if saved != [sorted", "if False and [sorted"),
        ("group.update(", "dict(group).update("),
    ],
    "engine/states._read_others": [("whole.copy_(master)", "pass")],
    "engine/states._told": [("is not nn.Module._load", "is nn.Module._load")],
    "engine/states._same": [("if saved[name] != now[name]", "if False")],
    "engine/states.attempt": [("errors.append(", "str(")],
    "engine/shards.fill": [
        ("if at < end:", "if False:"),
        ("[at - begin : stop", "[0 : stop"),
    ],
    "engine/shards.packed": [("in (list, tuple)", "in (list,)")],
    "engine/fragments.follow_masters": [("zero.update_lp_params()", "pass")],
    "engine/fragments.held_at": [("min(parameter.ds_numel - start, size)", "size")],
    "engine/fragments._sub_groups": [("length, rank * size))", "length, rank))")],
    "engine/fragments.ZeroPieces": [
        ('getattr(parameter, "ds_tensor", parameter)', "parameter"),
        ("if parameter.ds_persist", "if not parameter.ds_persist"),
        ("            parameter.partition()", "            parameter"),
        ("        forget_copies(parameters)", "        pass"),
    ],
    "engine/engine.__init__": [
        ("if batch_size % shares:", "if batch_size < shares:"),
        ('hasattr(self.ds.optimizer, "fp32_groups_flat")', "False"),
    ],
    "engine/engine.step": [
        ('on_nonfinite == "skip"', 'on_nonfinite == "stop"'),
        ("buffer.copy_(before[name])", "buffer.copy_(buffer)"),
    ],
    "engine/engine._backward_each": [
        ('float("nan"))', "1.0)"),
        ("finite & torch.isfinite", "finite | torch.isfinite"),
        ("join(kept) if kept", "kept[0] if kept"),
        ('"prepared" if prepared', '"all" if prepared'),
        ("not self.method.couples_batch", "self.method.couples_batch"),
        ("size / sum(sizes)", "1 / len(sizes)"),
    ],
    "engine/engine._backward_whole": [
        ('float("nan"))', "1.0)"),
        ("range(scale - 1 - large.replays)", "range(0)"),
        ("self.ds.backward(part * scale)", "self.ds.backward(part)"),
        ("                    self.ds.step()", "                    pass"),
    ],
    "engine/large_batch.check_batch_norms": [
        ('or cfg.large_batch == "plain"', "or False"),
        ("batch_size < 2 *", "batch_size < 1 *"),
        ("moving_in(network)", "network.modules()"),
    ],
    "engine/large_batch.check_deepspeed": [
        ("cfg.zero_stage > 1", "cfg.zero_stage > 2"),
        ("not cfg.reduce_once and", "cfg.reduce_once and"),
        ("cfg.zero_stage < 2 and", "cfg.zero_stage < 1 and"),
    ],
    "engine/large_batch.compare": [
        ("if whole or key", "if key"),
    ],
    "engine/large_batch._encode": [
        ("requires_grad_(made.requires_grad)", "requires_grad_(True)"),
        ("join(targets) if", "targets[0] if"),
    ],
    "engine/large_batch.Shape": [("if func in _OF_SHAPES:", "if True:")],
    "engine/large_batch.check_rows": [("if found != rows", "if found < rows")],
    "engine/large_batch.replay": [
        ("drawn.again()", "pass"),
        ("after.again()", "pass"),
        ("with still_buffers(self._ds.module):", "if True:"),
        ("torch.zeros_like(row) if row.grad is None", "None if row.grad is None"),
    ],
    "engine/engine.loss_of": [
        ("or loss.ndim:", "or False:"),
        ("if not loss.requires_grad", "if loss is None"),
        ('if key != "keep" and', "if False and"),
    ],
    "engine/engine._sizes": [("(i < rows % n)", "(i > n - rows % n)")],
    "engine/engine._join_batch_norms": [
        ("micro < 2", "micro < 1"),
        ('endswith("running_mean")', 'endswith("running_std")'),
    ],
    "engine/engine._deepspeed_config": [
        ("_merge(config, keys), given)", "_merge(config, given), keys)"),
    ],
    "engine/launch._launched": [
        ('"RANK" in os.environ and missing', '"RANK" in os.environ and not missing'),
        ('not in ("", "1")', 'in ("", "1")'),
    ],
    "engine/peers._watch": [("!= _BYE", "== _BYE"), ("lost.append(rank)", "lost.append(0)")],
    "engine/groups._is_plain": [("param.ndim <= 1", "param.ndim <= 0"), ('"_token"', '"token_"')],
    "engine/optim._options_fit_the_name": [("0 <= beta < 1", "0 <= beta <= 1")],
    "engine/groups._layer_scales": [("|= _scales_of", "= _scales_of")],
    "engine/groups._scales_of": [("(last - k)", "(last - k + 1)")],
    "engine/optim.set_rates": [
        ('lr * group["lr_scale"]', "lr"),
        ('elif group["adapt"]:', 'elif not group["adapt"]:'),
    ],
    "engine/groups.parameter_groups": [
        ("if not param.requires_grad:", "if param is None:"),
        ("weight_decay if adapts else 0.0", "weight_decay"),
        ("scale *= rules", "scale = 2 * rules"),
    ],
    "engine/groups.own_rules": [
        ("if not trained & set(met):", "if not met:"),
        (
            "found[key] |= dict.fromkeys(rule.given, place)",
            "found[key] = dict.fromkeys(rule.given, place) | found[key]",
        ),
        ("if not any(place in", "if False and (place in"),
    ],
    "engine/clipping.counts": [("or any(self._now)", "")],
    "engine/clipping.begin": [("epoch < epochs", "epoch <= epochs")],
    "engine/clipping.measure": [("dist.all_reduce(squares", "(squares")],
    "engine/clipping._settle": [
        ("masked_fill(self.frozen, 0.0)", "clone()"),
        ("(norms[members] * theirs)", "norms[members]"),
        ("(norms * scales).norm()", "norms.norm()"),
    ],
    "engine/clipping._before_step": [('if not group["frozen"]]', "]")],
    "schedules/config.factor": [("(step + 0.5)", "(step + 0.0)")],
    "schedules/config.after": [("/ (self.stages - 1)", "/ self.stages")],
    "schedules/config.share": [("(self.until - self.warmup)", "self.until")],
    "schedules/config.validate": [("hundredth / 100):g", "1.0):g"), ("range(101)", "range(1)")],
    "schedules/config._filled": [
        ('("start", "end") if', '("start",) if'),
        ("{**whole, **value}", "value"),
    ],
    "engine/optim.build_optimizer": [("extra | cfg.options()", "cfg.options()")],
    "engine/optim._implementation": [
        ('name == "adamw"', 'name == "adam"'),
        ('if offloaded or device.type == "cpu"', "if offloaded"),
    ],
    "engine/layerwise._scale": [
        ("(norms > 0).all(0)", "(norms >= 0).any(0)"),
    ],
}
