"""`make demo`: the whole way of an image, from a prompt to the promoted configuration to the served pixels.

Everything it makes is in `runs/demo/`; what it starts it stops. The exit code says whether all doors agreed.
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

Row = tuple[str, str, str]


def run(*command: str | Path, **environment: str) -> str:
    """Run a command from the repository's root and return its output; its errors end the demo."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nfailed with exit code {done.returncode}:\n{done.stderr[-3000:]}"
        )
    return done.stdout


def same_pixels(first: Path, second: Path) -> str:
    from sdxl_lab.images import max_difference, open_image

    difference = max_difference(open_image(ROOT / first), open_image(ROOT / second))
    if difference:
        raise SystemExit(f"{first} and {second} must have the same pixels; they differ by {difference:.4f}")
    return "same pixels"


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
    parameters = {"prompt": PROMPT, "seed": str(SEED), "out": str(RUN / "notebook"), "slot": str(RUN / "slot")}
    given = [word for name, value in parameters.items() for word in ("-p", f"{name}={value}")]
    executed = RUN / "01_explore.ipynb"
    run(sys.executable, "-m", "sdxl_lab", "notebook", "notebooks/01_explore.ipynb", "--out", executed, *given)
    golden = RUN / "notebook" / "golden.png"
    return [
        ("notebook (papermill)", str(executed), "ran to its end"),
        ("promoted slot", str(RUN / "slot"), json.loads((ROOT / RUN / "slot/evidence.json").read_text())["digest"]),
        ("notebook's golden", str(golden), same_pixels(golden, RUN / "cat-refined.png") + " as the command line"),
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
    verdict = same_pixels(RUN / "served-generate.png", RUN / "notebook" / "golden.png")
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
        ("running notebooks/01_explore.ipynb, which promotes a configuration", notebook),
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
