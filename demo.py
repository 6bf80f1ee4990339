"""`make demo`: from a prompt to a promoted configuration to the served image, through every door.

Everything it makes is in `runs/demo/`, and it stops what it starts. The exit code says whether all doors agreed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RUN = Path("runs/demo")  # relative: no path of this machine gets into an image
PROMPT, SEED = "A cat in a hat", 7
SERVED = Path("service/promoted/nano")
# What the comparison draws beside `PROMPT`: a gate needs five prompts.
OTHERS = (
    "a blue boat on a white background",
    "a red star on a green background",
    "a yellow house on a green background",
    "a pink flower on a black background",
)
# The candidate takes three times the work of the served configuration. The default gates refuse that; these allow it.
GATES = ("unet_rows: at most 50", "sharpness: at most 25 % worse")

# With more threads the engine chooses how many a call has, and sums are rounded in another order: the doors would agree
# to one step of 8 bits only.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Row = tuple[str, str, str]


def attempt(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root, whatever its exit code."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)


def run(*command: str | Path) -> str:
    """Run a command and return its output; its errors end the demo."""
    done = attempt(*command)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nfailed with exit code {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return done.stdout


def same_pixels(first: Path, second: Path, allowed: float = 0) -> str:
    """The verdict for the report. `allowed` is on [0, 1]; a larger difference ends the demo."""
    from sdxl_lab.images import max_difference, open_image

    difference = max_difference(open_image(ROOT / first), open_image(ROOT / second))
    if difference > allowed:
        raise SystemExit(f"{first} and {second} must have the same pixels; they differ by {difference:.4f}")
    return "same pixels" if not allowed else "same pixels to one step of 8 bits"


def command_line() -> list[Row]:
    lab = (sys.executable, "-m", "sdxl_lab")
    plain, refined, again = (RUN / f"{name}.png" for name in ("cat", "cat-refined", "cat-again"))
    run(*lab, "generate", PROMPT, "--seed", str(SEED), "--out", plain)
    run(*lab, "generate", PROMPT, "--seed", str(SEED), "--refiner", "--out", refined)
    run(*lab, "generate", "--like", refined, "--out", again)
    return [
        ("command line", str(plain), "base alone"),
        ("command line", str(refined), "base, then refiner"),
        ("command line, --like", str(again), same_pixels(refined, again)),
    ]


def notebook() -> list[Row]:
    parameters = {"prompt": PROMPT, "seed": str(SEED), "out": str(RUN / "notebook")}
    given = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    executed, refined = RUN / "01_explore.ipynb", RUN / "notebook" / "refined.png"
    run(sys.executable, "-m", "sdxl_lab", "notebook", "notebooks/01_explore.ipynb", "--out", executed, *given)
    verdict = same_pixels(refined, RUN / "cat-refined.png")
    return [
        ("notebook (papermill)", str(executed), "ran to its end"),
        ("notebook's image", str(refined), f"{verdict} as the command line"),
        ("notebook's candidate", str(candidate()), "not promoted yet"),
    ]


def candidate() -> Path:
    (file,) = (ROOT / RUN / "notebook").glob("candidate-*.toml")
    return file.relative_to(ROOT)


def promotion() -> list[Row]:
    """The candidate against a copy of the served slot: refused by the default gates, promoted by its own."""
    slot = RUN / "slot"
    shutil.copytree(ROOT / SERVED, ROOT / slot)
    prompts = [word for prompt in (PROMPT, *OTHERS) for word in ("--prompt", prompt)]
    gates = [word for gate in GATES for word in ("--gate", gate)]
    # The demo has to run in a work tree with changes, too: hence --allow-dirty.
    command = [sys.executable, "-m", "sdxl_lab", "promote", str(candidate()), str(slot), "--seed", str(SEED), *prompts]
    command += ["--who", "demo", "--why", "details from the refiner, at three times the work", "--allow-dirty"]
    refused = attempt(*command)
    if refused.returncode != 1 or "must pass all of its gates" not in refused.stderr:
        raise SystemExit(f"the default gates must refuse the candidate; received:\n{refused.stderr[-3000:]}")
    run(*command, *gates)
    golden = next((ROOT / slot / "golden").glob("01-*.png")).relative_to(ROOT)
    evidence = json.loads((ROOT / slot / "evidence.json").read_text())
    return [
        ("promotion, default gates", str(slot), "refused: more work than they allow"),
        (
            "promotion, its own gates",
            str(slot),
            f"config {evidence['digest'][:12]} replaces {evidence['replaces'][:12]}",
        ),
        # A golden is drawn in a batch with others, which rounds single samples differently.
        ("slot's first golden", str(golden), same_pixels(golden, RUN / "cat-refined.png", 1 / 255)),
    ]


def served() -> list[Row]:
    environment = os.environ | {"SDXL_CONFIG": str(RUN / "slot"), "SDXL_STORE": str(RUN / "images")}
    with (ROOT / RUN / "service.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            _, _, address = server.stdout.readline().partition("service: ")
            address = address.partition(" ")[0]
            wait_until_ready(server, address)
            return served_images(address)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def served_images(address: str) -> list[Row]:
    rows = []
    generated = curl_json(address, "/generate", {"prompt": PROMPT, "seed": SEED})
    refined = curl_json(address, "/refine", {"id": generated["id"], "strength": 0.3, "seed": SEED})
    for name, answer in (("generate", generated), ("refine", refined)):
        path = RUN / f"served-{name}.png"
        run("curl", "--fail", "--silent", "--show-error", "--output", path, address + answer["url"])
        rows.append((f"HTTP /{name}, /download", str(path), f"config {answer['config']}"))
    verdict = same_pixels(RUN / "served-generate.png", RUN / "notebook" / "refined.png")
    rows[0] = (*rows[0][:2], f"{verdict} as the notebook, {rows[0][2]}")
    again = RUN / "served-generate-again.png"
    run(sys.executable, "-m", "sdxl_lab", "generate", "--like", RUN / "served-generate.png", "--out", again)
    rows.append(("served PNG, --like", str(again), same_pixels(RUN / "served-generate.png", again)))
    return rows


def curl_json(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    content = ("-H", "Content-Type: application/json", "-d", json.dumps(body))
    answer: dict[str, Any] = json.loads(run("curl", "--fail-with-body", "-sS", "-X", "POST", address + path, *content))
    return answer


def wait_until_ready(server: subprocess.Popen[str], address: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        asked = subprocess.run(["curl", "--fail", "--silent", f"{address}/readyz"], capture_output=True, check=False)
        if asked.returncode == 0:
            return
        time.sleep(0.2)
    raise SystemExit(f"the service did not get ready; its log is {RUN / 'service.log'}")


def main() -> None:
    if shutil.which("curl") is None:
        raise SystemExit("the demo asks the service with curl, which is missing. On Debian: apt-get install curl")
    began = time.monotonic()
    print("Some two minutes on two cores.", flush=True)
    shutil.rmtree(ROOT / RUN, ignore_errors=True)
    (ROOT / RUN).mkdir(parents=True)
    rows: list[Row] = []
    for title, part in (
        ("drawing from the command line (3 images)", command_line),
        ("running notebooks/01_explore.ipynb, which saves a candidate", notebook),
        ("promoting the candidate: refused by the default gates, then passed by its own", promotion),
        ("serving what was promoted, and asking for images over HTTP", served),
    ):
        print(f"... {title}", flush=True)
        rows += part()
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print()
    for door, place, outcome in rows:
        print(f"{door:{widths[0]}}  {place:{widths[1]}}  {outcome}")
    print(f"\nOne configuration, three doors, the same pixels: {time.monotonic() - began:.0f} s. Images: {RUN}/")
    print("Next: make lab, make serve, and the first hour in README.md")


if __name__ == "__main__":
    main()
