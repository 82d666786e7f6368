"""A server of 127.0.0.1 that answers chat by a rule and scores token ids with a model here, as vLLM's protocol has it.

    with LogprobServer(model, reply=lambda question: "text") as server: server.base_url; server.scored

`POST /v1/completions` takes ids and gives `prompt_logprobs`: null for the first, then {id: {logprob, rank,
decoded_token}} of the `prompt_logprobs` likeliest ids and of the one that stands there. `most`: as `--max-logprobs`;
more is refused in vLLM's words. `broken` changes a reply before it is sent.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from misbehaving_server import completion


class LogprobServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model, reply, most: int = 20, broken=lambda tables: tables):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.reply, self.most, self.broken, self.scored = model, reply, most, broken, 0
        self.lock = threading.Lock()
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def tables(self, ids: list[int], k: int) -> list:
        logs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found: list = [None]
        for place, token in enumerate(ids[1:]):
            rank_of = logs[place].argsort(descending=True, stable=True).tolist()
            named = dict.fromkeys([*rank_of[:k], token])
            found.append(
                {
                    str(i): {
                        "logprob": float(logs[place, i]),
                        "rank": rank_of.index(i) + 1,
                        "decoded_token": "?",
                    }
                    for i in named
                }
            )
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LogprobServer

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/chat/completions"):
            return self.send(completion(self.server.reply(body["messages"][-1]["content"])))
        wanted = body["prompt_logprobs"]
        if wanted > self.server.most:
            said = f"Requested prompt logprobs of {wanted}, which is greater than max allowed: {self.server.most}"
            return self.send({"error": {"message": said, "code": 400}}, 400)
        with self.server.lock:  # one model, one pass at a time
            self.server.scored += 1
            tables = self.server.tables(body["prompt"], wanted)
        choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None}
        choice["prompt_logprobs"] = self.server.broken(tables)
        return self.send(
            {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        )

    def send(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
