"""A small program that speaks for vLLM, in the part of its protocol that is used: `vllm serve` on a Unix socket.

Its replies are greedy, whatever the request says. `--trick fails` ends it before it serves, `--trick dies` when asked.
"""

import argparse
import json
import os
import shlex
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

NAMES = ("--served-model-name", "--uds", "--dtype", "--max-model-len", "--generation-config", "--trick")


def stand_in_command(folder: Path) -> str:
    """Writes a command that starts this program, and returns its path."""
    path = folder / "speaks-for-vllm"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} "$@"\n')
    path.chmod(0o755)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("command", "model", *NAMES):
        parser.add_argument(name)
    parser.add_argument("--no-enable-chunked-prefill", action="store_true")
    given = parser.parse_args()
    print("loading", given.model, flush=True)
    if given.trick == "fails":
        sys.exit("ValueError: no such architecture")
    print("pid", os.getpid(), flush=True)

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if given.trick == "dies":
                os._exit(3)
            if len(asked["prompt"]) + asked["max_tokens"] > int(given.max_model_len):
                self.answer(400, {"error": "the prompt is too long"})
                return
            ids, logps, end = list(asked["prompt"]), [], asked["stop_token_ids"]
            start = len(ids)
            while len(logps) < asked["max_tokens"] and ids[-1:] != end:
                with torch.no_grad():
                    row = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
                ids.append(int(row.argmax()))
                logps.append(float(row.max()))
            made = {"token_ids": ids[start:], "logprobs": {"token_logprobs": logps}}
            self.answer(200, {"choices": [made | {"index": number} for number in reversed(range(asked["n"]))]})

        def answer(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self):
            return "socket"

    class Listening(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    Listening(given.uds, Handler).serve_forever()


if __name__ == "__main__":
    main()
