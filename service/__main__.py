import argparse
import logging
import os
import signal
import socket
import sys

import uvicorn

from sdxl_lab.config import ConfigError
from sdxl_lab.promotion import SlotError
from service.app import create_app
from service.settings import Settings, SettingsError, documentation

# dstack kills a replica 10 s after it asked it to stop.
GRACE_SECONDS = 7


def main() -> int:
    """Serve until SIGTERM or SIGINT. 2: it cannot start; 1: the models cannot be loaded."""
    arguments = parse()
    try:
        settings = Settings.from_mapping()
        configure_logging(settings.log_level)
        app = create_app(settings)
        listener = socket.create_server(
            (arguments.host, arguments.port),
            family=socket.AF_INET6 if ":" in arguments.host else socket.AF_INET,
        )
    except (SettingsError, SlotError, ConfigError, OSError) as error:
        print(f"service: {error}", file=sys.stderr)
        return 2
    studio = app.state.studio
    options = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_SECONDS)
    server = uvicorn.Server(options)

    def stop() -> None:
        server.should_exit = True

    studio.when_failed = stop
    # uvicorn raises its signal again once it has stopped; asked to stop and stopped is a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"service: http://{host}:{listener.getsockname()[1]} (slot {studio.slot.folder.name})", flush=True)
    server.run(sockets=[listener])
    logging.shutdown()
    # A thread that loads cannot be stopped, and torch takes seconds to end: nothing is left that they would save.
    os._exit(1 if studio.failure else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve a promoted configuration over HTTP.",
        epilog=f"environment:\n{documentation()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and prints it (default: 8000)")
    return parser.parse_args()


def configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
