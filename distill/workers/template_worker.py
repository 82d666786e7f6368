"""Renders a chat template in a process of its own, with little time and memory: a template is a program of a stranger.

    python template_worker.py < {"template": "...", "conversations": [[{"role", "content"}, ...], ...]}

Prints `done`, `long` (it wrote more than MOST_CHARACTERS) or `error` (it refuses these messages, which is its right).
It prints nothing where the time or the memory ends: then it was stopped. Started by distill/models/folders.py, by its
path, so that nothing but jinja2 is imported. What transformers gives to templates is given here too.
"""

import json
import resource
import sys
from datetime import datetime

SECONDS = 2
MEMORY = 2**29  # bytes
MOST_CHARACTERS = 1_000_000


def environment():
    """As transformers makes it: a sandbox that cannot change what it is given, loop controls, the same functions."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

        def _write(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def main() -> None:
    asked = json.load(sys.stdin)
    made = environment()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    said = "done"
    try:
        template = made.from_string(asked["template"])
        for messages in asked["conversations"]:
            try:
                text = template.render(messages=messages, add_generation_prompt=True, **asked["tokens"])
            except (MemoryError, OverflowError):
                raise
            except Exception:
                said = "error"
                continue
            if len(text) > MOST_CHARACTERS:
                said = "long"
                break
    except (MemoryError, OverflowError):
        return
    except Exception:
        said = "error"
    print(said)


if __name__ == "__main__":
    main()
