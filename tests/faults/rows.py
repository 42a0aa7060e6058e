"""The fault matrix: what may fail, and the behaviour that is promised then.
`@pytest.mark.row("B3")` lists the rows of a test; launch/faults.sh writes the results to
tests/faults/RESULTS.md (see conftest.py)."""

ROWS: dict[str, tuple[str, str]] = {  # row -> (fault, promise)
    # processes and time
    "A1": (
        "SIGKILL at a random instant",
        "the next start goes on bitwise from the last committed step",
    ),
    "A2": (
        "SIGTERM in any phase",
        "the step is finished and saved, or there is nothing to save yet; one line, exit 42",
    ),
    "A3": (
        "SIGTERM during an asynchronous save",
        "one complete newest step, no second save beside it",
    ),
    "A4": (
        "SIGINT, and a second one",
        "as SIGTERM; the second stops at once and harms no committed step",
    ),
    "A5": (
        "one of two processes killed",
        "the other ends within heartbeat + 5 s and names it; a restart resumes",
    ),
    "A6": ("one process hangs", "no barrier without a limit; stacks of all threads are written"),
    "A7": ("the input starves the main thread", "waiting is measured and logged"),
    "A8": (
        "another configuration or code on one host",
        "all refuse at the start and name the keys",
    ),
    "A9": ("resume on other devices and shardings", "the same state bit for bit, losses to 1e-6"),
    "A10": ("resume with other workers or hosts", "the same batches in the same order"),
    "A11": ("no tty, closed stdout, read-only directory, no HOME, umask 077", "the run goes on"),
    "A12": (
        "two runs in one working directory",
        "the second refuses; a lock of a dead process is none",
    ),
    "A13": (
        "one host compiles for minutes while another has its program",
        "all wait for it before the first collective, and name it",
    ),
    "A14": (
        "SIGKILL of a run with workers and all its processes",
        "the next run removes what is left in shared memory",
    ),
    "A15": (
        "a first host that has no address, or does not answer",
        "refused at once; a wait logs the missing hosts every 15 s",
    ),
    # checkpoints
    "B1": (
        "disk full during a save",
        "noticed, cleaned, tried again; the old step stays; ends after three misses",
    ),
    "B2": ("EIO, EACCES or quota during a save", "as B1"),
    "B3": (
        "any bit of a committed checkpoint flips",
        "found before training; the previous good step is used",
    ),
    "B4": ("a file truncated, emptied, deleted or swapped", "found, and the file is named"),
    "B5": (
        "leftovers, foreign files and links beside the steps",
        "the right step is chosen; no link is followed",
    ),
    "B6": (
        "retention against a reader, or only one good step",
        "never deletes the last good step or one being read",
    ),
    "B7": (
        "the layout of the state changed",
        "every missing, unexpected and differing key is listed",
    ),
    "B8": ("the state is donated while it is saved", "what is saved is the value at that step"),
    "B9": ("a checkpoint of an older version", "is loaded, or refused with its version"),
    "B10": ("too few devices for the state", "refused before anything is allocated"),
    "B11": (
        "power is lost after a step was named",
        "all of it is on the disk before its name, and before an older one goes",
    ),
    "B12": (
        "any file of a run flipped, cut, deleted, a directory, a link, a pipe",
        "the same result, one line, or a warning",
    ),
    "B13": (
        "checkpoints copied, exchanged, not mounted, not to be read",
        "none used under another number, none renamed, no start anew",
    ),
    # data
    "C1": (
        "bad images of every kind at 1 % and 20 %",
        "skipped, replaced and counted, always in the same order",
    ),
    "C2": ("more bad images than the limit", "stops with reasons and examples"),
    "C3": (
        "decompression bombs and extreme sizes",
        "refused by their header, memory stays bounded",
    ),
    "C4": ("16 bit, palette, CMYK, EXIF, WebP, GIF, gray", "the same RGB from every decoder"),
    "C5": ("captions that are missing, broken or huge", "dropped or repaired by rule, never NaN"),
    "C6": ("labels that are missing or out of range", "dropped with a reason, never clamped"),
    "C7": (
        "tar shards that are broken or hostile",
        "what is whole is read; nothing is written outside",
    ),
    "C8": ("ArrayRecord and TFRecord flipped or cut", "found by their checksums"),
    "C9": ("a shard that is missing or vanishes", "as configured, and the same after a resume"),
    "C10": ("a worker that is killed, fails or hangs", "an error or the same order again, in time"),
    "C11": ("data smaller than a batch, odd sizes, epoch ends", "defined or refused"),
    "C12": ("a mask of all or nothing, a partner that is itself", "never made"),
    "C13": (
        "a named pipe or device under the name of an image",
        "skipped and counted; one that appears later is logged at once",
    ),
    # numerics
    "D1": (
        "NaN or Inf in a loss, a gradient, a head",
        "the state stays bitwise; three in a row end the run with a dump that replays",
    ),
    "D2": ("a spike of the loss or the gradient", "skipped where asked for, and only there"),
    "D3": ("lambda of nothing, of tiny or of huge gradients", "finite and within its limits"),
    "D4": ("all targets become the same", "an alarm within 100 steps"),
    "D5": ("the same seed twice, with and without cache, log, evaluation", "the same bits"),
    "D6": ("other devices, microbatches, scan, remat", "the same losses"),
    "D7": (
        "bfloat16 products",
        "parameters, moments and target in float32; the target does not stall",
    ),
    "D8": ("2^31 examples, the last step, no step", "no overflow, a clean end"),
    # configuration and operation
    "E1": ("60 bad configurations", "each refused in 5 s, exit 2, with its key"),
    "E2": ("more memory than there is", "refused before the start, with what fits"),
    "E3": ("resume with a changed configuration", "the difference, and a flag where it matters"),
    "E4": ("optional packages missing", "the core works; the extra is named"),
    "E5": ("a metrics sink fails, the log disk is full", "training goes on, losses are counted"),
    "E6": ("no network", "everything local works"),
    "E7": (
        "any command, configuration file or file",
        "exit 0, 2 or 3, one line, nothing outside the working directory touched",
    ),
    "E8": ("an override that has no effect", "refused, with what would change something"),
    "E9": (
        "an evaluation of other data or weights than the run's",
        "named, and kept apart from the run's own",
    ),
    "E10": (
        "images preprocessed by evaluation, load and exports",
        "one description gives the same features",
    ),
    "E11": (
        "weights or a place to write to that are not there",
        "refused before anything is built",
    ),
    # security
    "F1": ("pickles in data, checkpoint, cache, override", "none is run"),
    "F2": ("archive names and links that lead out, terminal escapes", "contained"),
    "F3": ("code in configurations, URLs, YAML", "refused"),
    "F4": ("secrets in environment, URLs and paths", "in no output"),
    "F5": ("permissions of what is written", "private by default"),
    "F6": ("nested or huge metadata, bombs in records", "limits before parsing"),
    "F7": ("unsafe calls in the source", "none outside the allow-list"),
    "F8": (
        "weights of elsewhere: quantised, NaN, nested or inconsistent",
        "refused on one line, with the file",
    ),
}

# What cannot be tried on a small machine, or is not there yet: row -> why. It stands in the table
# of results.
NOT_HERE: dict[str, str] = {}
