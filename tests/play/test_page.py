"""The page of `distill play`, served and driven by typing and clicking in a headless browser.

Needs the extra `play`; the browser part also selenium (extra `browser`), Chromium and its driver.
"""

import json
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch

from distill.play import page as play_page
from distill.play.engine import Playground
from distill.play.records import Setup

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs the extra `play`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1440,1000",
]  # fmt: skip
PICKED = {
    "messages": [{"role": "user", "content": "What is 12 + 34?"}],
    "answer": "46", "verifier": "exact", "family": "addition", "level": "easy", "split": "test",
}  # fmt: skip


@pytest.fixture(scope="module")
def served(hub):
    """(address of the page, every address that this process tried to reach meanwhile)."""
    names = {"base": hub["plain"], "student": hub["llama"], "teacher": hub["qwen3_moe"]}
    reached, connect = [], socket.socket.connect

    def watched(self, address):
        reached.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        playground = Playground(
            Setup(names, "teacher", [PICKED], max_new_tokens=8, title="tiny"), torch.device("cpu")
        )
        bound = play_page.bind(0)
        server = play_page.server(playground)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/", reached
        server.should_exit = True
        thread.join(10)


def test_served_to_this_machine_alone_and_from_it_alone(served):
    address, reached = served
    with urllib.request.urlopen(address) as answer:
        page, policy = answer.read().decode(), answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(["']?([^"')]+)""", page)
    outside = [
        a or b for a, b in fetched if re.match(r"(https?:)?//", a or b) and not (a or b).startswith(address)
    ]
    assert fetched and not outside
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page).group(1))
    assert config["analytics_enabled"] is False
    other = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(other)
    assert {host for host, *_ in reached} <= {"127.0.0.1"}


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="driving the page needs the extra `browser`")
    if not (CHROMIUM and DRIVER):
        pytest.skip("driving the page needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person uses it: what they type into, click on, and wait to see."""

    def __init__(self, driver, address: str):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.all("#question textarea"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def until(self, condition, seconds: float = 60):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, 0.1, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        [box] = self.all(selector)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text, Keys.TAB)

    def click(self, selector: str, place: int = 0) -> None:
        self.all(selector)[place].click()

    def rounds(self, count: int) -> str:
        """Wait until so many rounds are in the table; the newest one's text."""
        self.until(lambda: len(self.all("#earlier tbody tr")) == count)
        return self.all("#earlier tbody tr")[0].text


def test_typing_and_clicking(served, browser):
    address, reached = served
    page = Page(browser, address)
    # The first example is asked by itself, and an example is asked by a click.
    assert "What is 12 + 34?" in page.rounds(1) and len(page.all("#examples button")) == 1
    page.click("#examples button")
    page.rounds(2)
    # A free question, typed: everybody answers, nobody is verified.
    page.type("#question textarea", "Why {{is}} <b>the</b> sky blue?")
    page.click("#ask")
    assert "greedy" in page.rounds(3)
    assert [card.text.splitlines()[0] for card in page.all(".player")] == ["base", "student", "teacher"]
    assert [v.text for v in page.all(".player .verdict")] == ["? not verified"] * 3
    assert "Why {{is}} <b>the</b> sky blue?" in page.all("#earlier")[0].text
    assert all(1 <= len(card.find_elements("css selector", ".token")) <= 8 for card in page.all(".player"))
    # A token of the student: its own weighing, the teacher's, the teacher's experts.
    page.click(".player:nth-child(2) .token", 1)
    page.until(lambda: "student, token 2 of" in page.all("#look h3")[0].text)
    assert [len(options.find_elements("css selector", "li")) for options in page.all("#look .options")] == [
        5,
        5,
    ]
    assert len(page.all("#look .experts tr")) == 2 and len(page.all("#look .expert.chosen")) == 4
    # A picked problem, sampled, with one expert per token of the teacher: verified.
    page.click("#pick input")
    page.until(lambda: page.all("#pick ul li, ul.options li"))[0].click()
    page.until(lambda: page.all("#question textarea")[0].get_property("value") == "What is 12 + 34?")
    page.type("#temperature input[type=number]", "1")
    page.type("#top_k input[type=number]", "1")
    page.click("#ask")
    assert "temperature 1; seed 0; teacher: 1 expert per token" in page.rounds(4)
    assert (
        "Right answer: 46 (the problem's own answer; addition, easy; held out"
        in page.all(".right-answer")[0].text
    )
    assert not any("not verified" in v.text for v in page.all(".player .verdict"))
    # An expert is dropped by a click, and all are asked again.
    page.click(".player:nth-child(3) .token")
    page.until(lambda: "teacher, token 1 of" in page.all("#look h3")[0].text)
    [first, _] = page.all("#look .expert.chosen")
    layer, expert = first.get_attribute("data-layer"), first.get_attribute("data-expert")
    first.click()
    assert re.search(rf"without layer \d expert {expert}\b", page.rounds(5)) and layer == "model.layers.0.mlp"
    page.click(".player:nth-child(3) .token")
    page.until(lambda: "teacher, token 1 of" in page.all("#look h3")[0].text)
    assert [gone.text for gone in page.all("#look .expert.gone")] == [expert]
    # Narrow screens: the page does not scroll sideways.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    # Nothing came from outside, and the browser had nothing to complain about.
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = [url for url in asked if not url.startswith("chrome")]  # the browser's own start page
    assert len(own) > 10 and all(url.startswith((address, "data:", "blob:")) for url in own)
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    assert {host for host, *_ in reached if host} <= {"127.0.0.1"}
