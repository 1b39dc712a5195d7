"""Tables of bad inputs, faults and the server under load."""

from cells import read_result

from latent_shift.files import markdown_table


def bad_inputs() -> str:
    """Tabulate `make fuzz`."""
    outcomes = read_result("fuzz")["outcomes"]
    names = list(next(iter(outcomes.values())))
    total = {name: sum(count[name] for count in outcomes.values()) for name in names}
    rows = [
        [kind.replace("_", " "), *(f"{number:,}" for number in (sum(count.values()), *count.values()))]
        for kind, count in {**outcomes, "all": total}.items()
    ]
    return markdown_table(["input", "tried", *names], rows)


def faults_of_training() -> str:
    """Tabulate `tests/faults.py 50`."""
    return markdown_table(["fault", "lost"], read_result("faults")["rows"])


def faults_of_commands() -> str:
    """Tabulate `tests/command_faults.py`."""
    return markdown_table(["command", "fault", "lost"], read_result("command-faults")["rows"])


def faults_of_server() -> str:
    """Tabulate `tests/server_faults.py`."""
    return markdown_table(["fault", "lost"], read_result("server-faults")["rows"])


def serving() -> str:
    """Tabulate `latent-shift bench serve`."""
    result = read_result("serve")
    seconds, counts = result["seconds"], result["durability"]
    rates = result["clips a second, Ray workers of one thread"]
    rows = [
        [f"jobs lost, made twice, of {counts['requests']:,} from {counts['clients']} clients through {counts['kills']} kills",
         f"{counts['lost']}, {counts['made twice']}"],
        ["jobs that completed, that failed with a reason", f"{counts['completed']:,}, {counts['failed with a reason']:,}"],
        ["until the server answers, until the model is loaded, s", f"{seconds['start']:.2f}, {seconds['ready']:.1f}"],
        ["a clip of one step, an mp4 included, beside the same call of a pipeline, ms more", f"{1000 * seconds['overhead']:.0f}"],
        ["from a request to the first preview, s", f"{seconds['first_preview']:.2f}"],
        ["first paint of the page in a new browser, ms", f"{1000 * seconds['first_paint']:.0f}"],
        ["from SIGTERM to the end, s", f"{seconds['stop']:.1f}"],
        ["clips of two Ray workers with a thread each, times those of one", f"{rates['2'] / rates['1']:.2f}"],
    ]  # fmt: skip
    return markdown_table(["measured", "figure"], rows)


def fuzz_of_server() -> str:
    """Tabulate `tests/fuzz_server.py`."""
    result = read_result("fuzz-server")
    statuses = result["statuses"]
    kinds = {"2": "served", "3": "served", "4": "refused", "5": "refused"}
    counts = dict.fromkeys(("served", "refused", "closed"), 0)
    for status, count in statuses.items():
        counts[kinds.get(status[0], "closed")] += count
    memory = result["MiB of the server after each tenth"]
    rows = [[f"{result['requests']:,}", f"{counts['served']:,}", f"{counts['refused']:,}", f"{statuses.get('500', 0)}", f"{result['faults']}",
             f"{memory[1]} to {memory[-1]}"]]  # fmt: skip
    return markdown_table(
        [
            "requests",
            "served",
            "refused",
            "status 500",
            "faults of any kind",
            "memory after two tenths and at the end, MiB",
        ],
        rows,
    )


TABLES = (
    bad_inputs,
    faults_of_training,
    faults_of_commands,
    faults_of_server,
    serving,
    fuzz_of_server,
)
