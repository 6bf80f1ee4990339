import argparse
import logging
import os
import signal
import socket
import sys

from sdxl_lab.config import ConfigError
from sdxl_lab.release.slot import SlotError
from service.app import create_app
from service.server import logging as logs
from service.server.process import Server
from service.settings import Settings, SettingsError, documentation, strangers

log = logging.getLogger("service")


def main() -> int:
    """Serve until SIGTERM or SIGINT. 2: it cannot start; 1: the models cannot be loaded, or the engine is broken."""
    arguments = parse()
    try:
        settings = Settings.from_mapping()
        logs.configure(settings.log_level)
        if ignored := strangers(os.environ):
            log.info("ignored, since they are no settings: %s", ", ".join(ignored))
        app = create_app(settings)
        listener = socket.create_server(
            (arguments.host, arguments.port),
            family=socket.AF_INET6 if ":" in arguments.host else socket.AF_INET,
        )
    except (SettingsError, SlotError, ConfigError, OSError, OverflowError) as error:  # OverflowError: no such port
        print(f"service: {error}", file=sys.stderr)
        return 2
    jobs = app.state.jobs
    server = Server(app, jobs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"service: http://{host}:{listener.getsockname()[1]} (slot {jobs.deployment.slot.folder.name})", flush=True)
    server.run(sockets=[listener])
    server.leave()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve a promoted configuration over HTTP.",
        epilog=f"environment:\n{documentation()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and prints it (default: 8000)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
