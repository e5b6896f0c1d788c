"""Training on several ranks, each a process: the same losses as alone, checkpoints that move, ranks that die."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BUILD = Path(os.environ.get("LATTE_BUILD_DIR", Path(__file__).parents[2] / "build"))
LATTE = BUILD / "latte"

pytestmark = pytest.mark.skipif(not (LATTE.exists() and (BUILD / "latte-torch").exists()), reason="the programs aren't built")

TINY = ["--layers", "1", "--embed-dim", "16", "--heads", "2", "--context", "16", "--batch", "4", "--eval-batches", "3"]
SHORT = [*TINY, "--steps", "6", "--warmup", "2", "--eval-every", "3", "--save-every", "3", "--threads", "1", "--dtype", "float32"]
ENDLESS = [*TINY, "--steps", "100000000", "--eval-every", "0", "--save-every", "5", "--threads", "1", "--dtype", "float32"]
# Sums in another order: some hundred roundings of float32, and Adam, which divides by what may be small.
SAME = 2e-5


def environment(**more) -> dict:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "MASTER", "RANK", "WORLD"))}
    return clean | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} | {key: str(value) for key, value in more.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Job:
    """`ranks` processes of latte train, as torchrun would start them."""

    def __init__(
        self,
        ranks: int,
        *arguments,
        hosts: tuple[str, ...] = (),
        command: tuple[str, ...] = ("train",),
        memory: int | None = None,
    ) -> None:
        meeting = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
        if hosts:
            meeting |= {"MASTER_ADDR": "10.213.0.1", "GLOO_SOCKET_IFNAME": "latte0"}
        self.ranks = [
            subprocess.Popen(
                [*self.on(hosts, rank, ranks), LATTE, *command, *map(str, arguments)],
                env=environment(RANK=rank, **meeting),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=limit_of(memory),
            )
            for rank in range(ranks)
        ]

    @staticmethod
    def on(hosts: tuple[str, ...], rank: int, ranks: int) -> list[str]:
        return ["ip", "netns", "exec", hosts[rank * len(hosts) // ranks]] if hosts else []

    def finish(self) -> list[tuple[int, str, str]]:
        ends = [rank.communicate() for rank in self.ranks]
        return [(rank.returncode, out, err) for rank, (out, err) in zip(self.ranks, ends, strict=True)]

    def succeed(self) -> None:
        for code, _, err in self.finish():
            assert code == 0, err


def alone(*arguments, memory: int | None = None) -> subprocess.CompletedProcess:
    command = [LATTE, "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), preexec_fn=limit_of(memory))


def limit_of(memory: int | None):
    """What gives a new process so many bytes of memory; None: all there is."""
    return memory and (lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory)))


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, reference: Path) -> None:
    got, expected = metrics_of(run), metrics_of(reference)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for line, wanted in zip(got, expected, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], rel=SAME)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
        assert line["tokens"] == wanted["tokens"]
        if wanted["val_loss"] is not None:
            assert line["val_loss"] == pytest.approx(wanted["val_loss"], rel=SAME)


def wait_for(condition, job: Job) -> None:
    while not condition():
        assert all(rank.poll() is None for rank in job.ranks), job.finish()
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, []),
        (4, ["--accumulate", "2"]),
        (2, ["--embed-dim", "384"]),  # 7 MB of gradients: several buckets
        (2, ["--sequence-parallel", "2", "--window", "4", "--sinks", "2"]),
        (4, ["--sequence-parallel", "4", "--attention", "latte", "--position", "rg_lru"]),
        (4, ["--sequence-parallel", "2", "--window", "4", "--position", "vapor"]),
    ],
)
def test_losses_are_those_of_one_process(tmp_path: Path, text: Path, ranks: int, options: list[str]) -> None:
    model = options[2:] if "--sequence-parallel" in options else options
    result = alone("--text", text, *SHORT, *model, "--out", tmp_path / "alone")
    assert result.returncode == 0, result.stderr
    job = Job(ranks, "--text", text, *SHORT, *options, "--out", tmp_path / "shared", "--json")
    ends = job.finish()
    assert [code for code, _, _ in ends] == [0] * ranks, ends
    # The first rank alone speaks.
    assert json.loads(ends[0][1])["step"] == 6
    assert all(out == "" and err == "" for _, out, err in ends[1:])
    assert_same(tmp_path / "shared", tmp_path / "alone")


LISTOPS = ["--task", "listops", "--set", "min_length=4", "--set", "max_length=20", "--set", "train=60"]
TASKS = {
    # Batch norms over padded sequences and over what is pooled, whose statistics are the whole batch's.
    "classify": [*LISTOPS, "--norm", "batch", "--pooled-norm", "batch"],
    "plain": [*LISTOPS, "--accumulate", "2"],
    "pairs": ["--task", "retrieval"],
    # Each rank is asked for another number of tokens.
    "tokens": ["--task", "masked_language", "--set", "length=24"],
}


def task_options(name: str, folder: Path, text: Path) -> list[str]:
    options = [*TASKS[name], "--attention", "latte"]
    options += ["--layers", "1", "--embed-dim", "16", "--heads", "2", "--batch", "4", "--eval-batches", "3", "--steps", "6"]
    options += ["--warmup", "2", "--eval-every", "3", "--save-every", "3", "--threads", "1", "--dtype", "float32"]
    if name in ("classify", "plain"):
        return [*options, "--set", "validation=21", "--set", "test=10"]
    if name == "tokens":
        return [*options, "--data", str(text)]
    for part in ("train", "eval", "test"):
        lines = [f"{i % 2}.0\t{i}\t{i + 1}\t{'ab' * (1 + i % 5)}\t{'ba' * (1 + i % 3)}" for i in range(23)]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("\n".join(lines) + "\n")
    return [*options, "--data", str(folder)]


@pytest.mark.parametrize(("name", "ranks"), [("classify", 2), ("classify", 4), ("plain", 2), ("pairs", 2), ("tokens", 4)])
def test_a_tasks_losses_are_those_of_one_process(tmp_path: Path, text: Path, name: str, ranks: int) -> None:
    options = task_options(name, tmp_path, text)
    result = alone(*options, "--out", tmp_path / "alone", "--json")
    assert result.returncode == 0, result.stderr
    ends = Job(ranks, *options, "--out", tmp_path / "shared", "--json").finish()
    assert [code for code, _, _ in ends] == [0] * ranks, ends
    assert all(out == "" and err == "" for _, out, err in ends[1:])
    assert_same(tmp_path / "shared", tmp_path / "alone")
    splits, expected = json.loads(ends[0][1])["splits"], json.loads(result.stdout)["splits"]
    assert splits.keys() == expected.keys()
    for split, values in expected.items():
        assert splits[split]["loss"] == pytest.approx(values["loss"], rel=SAME)
        assert splits[split]["accuracy"] == values["accuracy"] and splits[split]["examples"] == values["examples"]
    # Its checkpoint goes on alone, and alone's on ranks.
    assert alone("--out", tmp_path / "shared", "--resume", "--steps", 7, "--threads", 1).returncode == 0
    Job(ranks, "--out", tmp_path / "alone", "--resume", "--steps", 7, "--threads", 1).succeed()
    assert_same(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.parametrize("shared", ["batch", "sequence"])
def test_what_one_rank_has_no_memory_for_is_shared(tmp_path: Path, shared: str) -> None:
    """A step takes 3 GB; each process may have 2.6, of which libtorch and Gloo need half of one."""
    available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    if not available or int(available[1]) < 8 << 20:
        pytest.skip("needs 8 GB of memory")
    text = tmp_path / "long.txt"
    text.write_text("A text that goes on and on, from the first of its words to the last. " * 90_000)
    options = ["--text", text, "--layers", "1", "--embed-dim", "32", "--heads", "2", "--steps", "1", "--warmup", "1"]
    options += ["--eval-every", "0", "--save-every", "0", "--eval-batches", "1", "--threads", "1", "--dtype", "float32"]
    if shared == "batch":
        options += ["--context", "1024", "--batch", "512"]
    else:
        options += ["--context", "524288", "--batch", "1", "--window", "16"]
    memory = 2600 << 20
    result = alone(*options, "--out", tmp_path / "alone", memory=memory)
    assert result.returncode == 1
    assert "out of memory" in result.stderr.splitlines()[-1]
    if shared == "sequence":
        options += ["--sequence-parallel", "2"]
    Job(2, *options, "--out", tmp_path / "shared", memory=memory).succeed()
    assert metrics_of(tmp_path / "shared")[-1]["step"] == 1


def test_a_task_shares_no_sequence(tmp_path: Path, text: Path) -> None:
    options = task_options("plain", tmp_path, text)
    for more, message in [(["--sequence-parallel", "2"], "--sequence-parallel is 2"), (["--batch", "5"], "batch is 5")]:
        ends = Job(2, *options, *more, "--out", tmp_path / "run").finish()
        assert all(code == 2 and message in err for code, _, err in ends), ends
        assert not (tmp_path / "run").exists()


def test_checkpoints_load_on_any_number_of_ranks(tmp_path: Path, text: Path) -> None:
    """Six steps alone are three on four ranks, two on two that share sequences, and one alone."""
    alone("--text", text, *SHORT, "--window", "4", "--out", tmp_path / "alone")
    run = tmp_path / "moved"
    schedule = [*SHORT, "--window", "4", "--save-every", "1", "--out", run]
    Job(4, "--text", text, *schedule, "--steps", "3").succeed()
    # The rate depends on --steps: what is compared are runs that name six steps, so the first three are trained anew.
    Job(4, "--text", text, *schedule, "--overwrite").succeed()
    assert_same(run, tmp_path / "alone")
    for steps, ranks, options in [(8, 2, ["--sequence-parallel", "2"]), (9, 4, [])]:
        Job(ranks, "--out", run, "--resume", "--steps", steps, *options).succeed()
        assert metrics_of(run)[-1]["step"] == steps
    result = alone("--out", run, "--resume", "--steps", 10)
    assert result.returncode == 0, result.stderr
    assert metrics_of(run)[-1]["step"] == 10
    # The same steps, one process all along.
    for steps in (8, 9, 10):
        assert alone("--out", tmp_path / "alone", "--resume", "--steps", steps).returncode == 0
    assert_same(run, tmp_path / "alone")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "softmax", "--sequence-parallel", "2"], "attention is softmax, which reads every earlier token"),
        (["--sequence-parallel", "2", "--window", "9"], "a rank's stretch is 8 tokens, expected at least 9"),
        (["--batch", "3"], "batch is 3, expected a multiple of 2"),
        (["--context", "15", "--sequence-parallel", "2"], "context is 15, expected a multiple of 2"),
        (["--sequence-parallel", "3"], "--sequence-parallel is 3, expected a divisor of the 2 ranks"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, text: Path, options: list[str], message: str) -> None:
    for code, _, err in Job(2, "--text", text, *SHORT, *options, "--out", tmp_path / "run").finish():
        assert code == 2
        assert message in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, 'the environment\'s WORLD_SIZE is "two", expected an integer'),
        ({"WORLD_SIZE": "2", "RANK": "2"}, 'the environment\'s RANK is "2", expected an integer in 0 … 1'),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_an_impossible_environment_is_refused(tmp_path: Path, text: Path, variables: dict, message: str) -> None:
    arguments = [LATTE, "train", "--text", text, *SHORT, "--out", tmp_path / "run"]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment(**variables))
    assert result.returncode == 2
    assert message in result.stderr


def test_sequence_parallel_alone_names_torchrun(tmp_path: Path, text: Path) -> None:
    result = alone("--text", text, *SHORT, "--sequence-parallel", "2", "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "torchrun" in result.stderr


@pytest.mark.parametrize(("victim", "survivor"), [(1, 0), (0, 1)])
def test_a_rank_that_dies_stops_the_job(tmp_path: Path, text: Path, victim: int, survivor: int) -> None:
    run = tmp_path / "run"
    job = Job(2, "--text", text, *ENDLESS, "--out", run, "--quiet")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 5, job)
    job.ranks[victim].kill()
    ends = job.finish()
    code, _, err = ends[survivor]
    assert code == 1, ends
    last = err.splitlines()[-1]
    assert last.startswith(f"latte: error: rank {survivor} of 2 stops: ")
    if victim == 1:
        assert f"rank 1 (process {job.ranks[1].pid} on " in last and "no longer answers" in last
    else:  # it held the store
        assert "the store where the ranks met no longer answers" in last
    # What it had saved is whole, and goes on with any number of ranks.
    step = 5 * (metrics_of(run)[-1]["step"] // 5) + 5
    assert alone("--out", run, "--resume", "--steps", step + 5).returncode == 0


def test_an_error_of_one_rank_is_told_by_the_others(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    job = Job(2, "--text", text, *ENDLESS, "--out", run, "--quiet")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 1, job)
    job.ranks[1].send_signal(signal.SIGSTOP)  # so that the first can't go on before the folder has changed
    checkpoint = run / "checkpoint.safetensors"

    def blocked() -> bool:
        checkpoint.unlink(missing_ok=True)
        try:
            checkpoint.mkdir()
        except FileExistsError:  # the first was just saving
            return False
        return True

    wait_for(blocked, job)
    job.ranks[1].send_signal(signal.SIGCONT)
    ends = job.finish()
    assert [code for code, _, _ in ends] == [1, 1]
    assert "checkpoint.safetensors" in ends[0][2].splitlines()[-1]


def test_ctrl_c_saves_on_all_ranks(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    job = Job(2, "--text", text, *ENDLESS, "--out", run, "--quiet")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 1, job)
    job.ranks[1].send_signal(signal.SIGINT)  # one is enough
    assert [code for code, _, _ in job.finish()] == [130, 130]
    step = metrics_of(run)[-1]["step"]
    assert alone("--out", run, "--resume", "--steps", step + 1).returncode == 0


@pytest.mark.parametrize("what", ["text", "plain"])
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path: Path, text: Path, what: str) -> None:
    """One of two ranks is killed in the middle; torchrun starts both again and the run ends as if nothing had been."""
    run = tmp_path / "run"
    reads = ["--text", str(text), *TINY] if what == "text" else task_options(what, tmp_path, text)
    steps = [*reads, "--steps", "150", "--eval-every", "0", "--save-every", "5", "--threads", "1", "--dtype", "float32"]
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", str(free_port()), str(LATTE), "train", *steps, "--out", str(run), "--quiet"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())

    def ranks_of(parent: int) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    while not ((run / "metrics.jsonl").exists() and len(metrics_of(run)) > 20):
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    os.kill(ranks_of(job.pid)[-1], signal.SIGKILL)
    _, err = job.communicate()
    assert job.returncode == 0, err
    assert [line["step"] for line in metrics_of(run)] == list(range(1, 151))
    Job(2, *steps, "--out", tmp_path / "undisturbed", "--quiet").succeed()
    weights = [tensors_of(folder) for folder in (run, tmp_path / "undisturbed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_torchruns_restart_takes_no_run_that_was_there_before(tmp_path: Path, text: Path, ranks: str) -> None:
    run = tmp_path / "run"
    Job(2, "--text", text, *SHORT, "--out", run, "--quiet").succeed()
    before = tensors_of(run)
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", ranks, "--max-restarts", "1"]
    command += ["--master-port", str(free_port()), str(LATTE), "train", "--text", str(text), *SHORT, "--out", str(run), "--quiet"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert again.returncode != 0 and "is there already" in again.stderr, again.stderr
    assert tensors_of(run) == before


def test_ranks_end_together_where_the_loss_diverges_or_nothing_is_left(tmp_path: Path, text: Path) -> None:
    ends = Job(2, "--text", text, *SHORT, "--lr", "1e30", "--min-lr", "1e30", "--warmup", "0", "--out", tmp_path / "far").finish()
    assert [code for code, _, _ in ends] == [3, 3], ends
    assert all("isn't finite at step" in err for _, _, err in ends)
    run = tmp_path / "run"
    Job(2, "--text", text, *SHORT, "--out", run, "--quiet").succeed()
    before = tensors_of(run)
    Job(2, "--out", run, "--resume", "--threads", "1", "--quiet").succeed()
    assert tensors_of(run) == before


def tensors_of(run: Path) -> dict[str, bytes]:
    from safetensors import safe_open

    with safe_open(run / "checkpoint.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys() if not re.match("random", name)}  # noqa: SIM118


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them, each a host of its own to what runs in it."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces takes root and the program ip")
    hosts = tuple(f"latte-{os.getpid()}-{end}" for end in "ab")

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", "latte0", "netns", hosts[0], "type", "veth", "peer", "name", "latte0", "netns", hosts[1])
        for number, host in enumerate(hosts, 1):
            ip("-n", host, "addr", "add", f"10.213.0.{number}/24", "dev", "latte0")
            for device in ("lo", "latte0"):
                ip("-n", host, "link", "set", device, "up")
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_two_hosts(tmp_path: Path, text: Path, two_hosts: tuple[str, str]) -> None:
    """Two ranks on each of two hosts share batches on one and sequences across the cable."""
    options = ["--text", text, *SHORT, "--window", "4"]
    assert alone(*options, "--out", tmp_path / "alone").returncode == 0
    for name, parallel in (("shared", "4"), ("mixed", "2")):
        Job(4, *options, "--sequence-parallel", parallel, "--out", tmp_path / name, hosts=two_hosts).succeed()
        assert_same(tmp_path / name, tmp_path / "alone")


def test_a_pulled_cable_stops_the_job(tmp_path: Path, text: Path, two_hosts: tuple[str, str]) -> None:
    run = tmp_path / "run"
    job = Job(2, "--text", text, *ENDLESS, "--timeout", "3", "--out", run, "--quiet", hosts=two_hosts)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 5, job)
    subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "latte0", "down"], check=True)
    ends = job.finish()
    assert [code for code, _, _ in ends] == [1, 1]
    assert "rank 1 (process" in ends[0][2].splitlines()[-1]
    assert "no longer answers" in ends[1][2].splitlines()[-1]


def test_gradients_travel_while_the_backward_pass_goes_on() -> None:
    options = ["--context", "16", "--batch", "2", "--embed-dim", "384", "--layers", "1", "--steps", "2", "--json"]
    ends = Job(2, *options, command=("bench", "distributed")).finish()
    assert [code for code, _, _ in ends] == [0, 0], ends
    measured = json.loads(ends[0][1])["measured"]
    assert measured["buckets"] >= 2  # 7 MB of gradients
    assert 1 <= measured["early_buckets"] < measured["buckets"]


def test_bench_distributed(tmp_path: Path) -> None:
    """What was sent is what the model says: 2 ranks, one message each way a layer for state, window and convolution."""
    options = ["--context", "64", "--batch", "1", "--window", "8", "--embed-dim", "32", "--layers", "2", "--steps", "2"]
    options += ["--sequence-parallel", "2", "--json"]
    job = Job(2, *options, command=("bench", "distributed"))
    ends = job.finish()
    assert [code for code, _, _ in ends] == [0, 0], ends
    report = json.loads(ends[0][1])
    measured = report["measured"]
    assert measured["sequence_bytes"] == measured["sequence_bytes_by_the_model"] > 0
    assert measured["gradient_bytes"] == pytest.approx(4 * measured["parameters"], rel=0.01)
    assert measured["tcp_bytes"] > measured["sequence_bytes"] + 0.9 * measured["gradient_bytes"]
    last = report["model"][-1]
    assert (last["ranks"], last["messages"]) == (1024, 22)
    assert last["ring_bytes"] > 100 * last["latent_bytes"]
    # The length of the sequence is none of the latents' business.
    longer = subprocess.run(
        [LATTE, "bench", "distributed", *options[:-3], "--tokens", "1000000000", "--json"], capture_output=True
    )
    assert json.loads(longer.stdout)["model"][-1]["latent_bytes"] == last["latent_bytes"]
