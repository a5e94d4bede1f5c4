"""The report in a real browser: it loads without an error, and hovering and choosing work. `make browser-test`.

With SCREENSHOTS=FOLDER, pictures of the page are left there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sniffer.experiments.common.entry import main
from sniffer.experiments.compare import compare
from sniffer.experiments.report import write
from sniffer.experiments.report.glossary import ORDER

from sniffer.sampler import All
from sniffer.types import Rope, Sections
from tests.experiments.planted import HEADS, SPEEDS, planted_run, roped
from tests.helpers_runs import Runs
from tests.tiny_run import save_texts

pytest.importorskip("selenium", reason="the browser test needs selenium: pip install -e '.[dev]'")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("the browser test needs chromium and chromedriver on the path", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Browser = webdriver.Chrome


def in_two(n_tokens: int) -> Sections:
    return Sections.spread([(0, 30, "question"), (30, n_tokens, "answer")], n_tokens)


@pytest.fixture(scope="module")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two planted jobs with every analysis of vectors, and one of a tiny model with that of attention."""
    sweep = tmp_path_factory.mktemp("browser") / "sweep"
    for job in "01":
        run = planted_run(
            sweep / job,
            roped(),
            kinds=("q", "k", "v", "q_pre", "k_pre"),
            sampler=All(bucket_size=64),
            lengths=[128, 100],
            sections=in_two if job == "1" else None,
            turns=Rope(tuple(SPEEDS)),
        )
        for name in ORDER:
            assert name == "attention" or main(name, [f"run={run.folder}"]) == 0
        (run.folder / ".hydra").mkdir()
        (run.folder / ".hydra" / "overrides.yaml").write_text(f"- sampler.base_rate={job}\n")
    texts = save_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")
    attending = Runs(checkpoint, texts, sweep).start("2", "dataset.max_tokens=64", "capture.attention=all")
    assert main("attention", [f"run={attending}"]) == 0
    words = [f"runs=[{sweep / '0'},{sweep / '1'}]", f"out={sweep / 'experiments' / 'compare'}", "groups=2"]
    assert main("compare", [*words, "analysis=key_rank"], compare) == 0
    write("report", [f"run={sweep}", "groups=2"])
    return sweep / "experiments" / "report" / "report.html"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that has never been used."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})  # type: ignore[no-untyped-call]
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Browser, page: Path) -> Iterator[Browser]:
    """The page, freshly loaded; at the end the console must be empty."""
    driver.set_window_size(1200, 900)
    driver.get(page.as_uri())
    yield driver
    assert driver.get_log("browser") == []  # type: ignore[no-untyped-call]


def text(browser: Browser, selector: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, selector).text)


def picture(browser: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_every_section_is_there(browser: Browser):
    assert text(browser, "h1") == "sweep"
    shown = [
        section.get_attribute("id")
        for section in browser.find_elements(By.CSS_SELECTOR, "main > section:not([hidden])")
    ]
    assert shown == [
        "findings", "compare", "compared", "run", "coverage", "head", "scatter-section", "sampling", "maps", "tables",
    ]  # fmt: skip
    for selector in (
        "#coverage-map canvas",
        "#plane circle",
        "#profile polyline",
        "#scatter circle",
        "#sampling-chart svg",
    ):
        assert browser.find_elements(By.CSS_SELECTOR, selector), selector
    assert len(browser.find_elements(By.CSS_SELECTOR, "#scatter circle")) == 2 * HEADS["q"]
    axes = [text(browser, f"figure[data-statistic='bias strength'] .{side}").split() for side in ("rows", "columns")]
    assert axes == [["1", "0"], ["0", "1", "2", "3"]]  # so few are labelled each
    picture(browser, "top")


def test_hovering_over_a_map_tells_the_value(browser: Browser):
    canvas = browser.find_element(By.CSS_SELECTOR, "figure[data-statistic='bias strength'] canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)  # type: ignore[no-untyped-call]
    ActionChains(browser).move_to_element_with_offset(
        canvas, -canvas.size["width"] // 2 + 3, canvas.size["height"] // 2 - 3
    ).perform()
    said = text(browser, "#tip")
    assert said.startswith("layer 0, head 0: ")
    true = browser.execute_script(  # type: ignore[no-untyped-call]
        "return DATA.jobs[0].maps.find((map) => map.name === 'bias_strength').values[0][0]"
    )
    first, about = said.split("\n")
    value, low, high = (float(word.strip("[],")) for word in first.partition(": ")[2].split())
    assert value == pytest.approx(true) and low <= value <= high
    assert about == "change of q.k per position of the key; positive favours later keys"
    picture(browser, "hover")


def test_the_head_picker_and_a_click_on_a_map_choose_a_head(browser: Browser):
    Select(browser.find_element(By.ID, "layer")).select_by_value("1")
    Select(browser.find_element(By.ID, "head-number")).select_by_value("2")
    there = browser.execute_script("return [state.layer, state.head]")  # type: ignore[no-untyped-call]
    assert there == [1, 2]
    before = browser.find_element(By.ID, "plane").get_attribute("innerHTML")
    canvas = browser.find_element(By.CSS_SELECTOR, "figure[data-statistic='r q'] canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)  # type: ignore[no-untyped-call]
    ActionChains(browser).move_to_element_with_offset(
        canvas, canvas.size["width"] // 2 - 3, canvas.size["height"] // 2 - 3
    ).click().perform()
    assert Select(browser.find_element(By.ID, "head-number")).first_selected_option.text == "3"
    assert Select(browser.find_element(By.ID, "layer")).first_selected_option.text == "0"
    assert browser.find_element(By.ID, "plane").get_attribute("innerHTML") != before


def test_every_choice_of_every_list_draws(browser: Browser):
    """Of the job with the statistics of attention, lists over planes and samples are not there."""
    lists = ["compare-statistic", "coverage-kind", "scatter-axis", "sampling-case", "analysis"]
    shown = []
    for job in range(3):
        Select(browser.find_element(By.ID, "job")).select_by_index(job)
        shown.append([name for name in lists if browser.find_element(By.ID, name).is_displayed()])
        for name in shown[-1]:
            for place in range(len(Select(browser.find_element(By.ID, name)).options)):
                Select(browser.find_element(By.ID, name)).select_by_index(place)
    assert shown[0] == shown[1] == lists
    assert {"compare-statistic", "coverage-kind", "analysis"} <= set(shown[2])
    Select(browser.find_element(By.ID, "analysis")).select_by_value("attention")
    assert browser.find_elements(By.CSS_SELECTOR, "figure[data-statistic='relative entropy'] canvas")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#compare-table tr")) >= 3


def test_each_number_says_what_it_is_and_how_sure_it_is(browser: Browser):
    said = text(browser, "#finding-list")
    assert "8 heads of 2 layers; " in said and "2 documents in 2 groups, each measured alone" in said
    medians = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#finding-list table tr")]
    assert any(row.startswith("plasticity\n1: content decides which key wins") and "[" in row for row in medians)
    rows = {row.text.split("\n")[0]: row.text for row in browser.find_elements(By.CSS_SELECTOR, "#head-values tr")}
    assert "correlation of keys with position on the drift axis" in rows["r k"] and "]" in rows["r k"]
    pair = next(row for name, row in rows.items() if name.startswith("strongest pair"))
    assert "[" not in pair and len(pair.split("\n")[-1].split()) == 3  # no median: this head's pair, and the analysis
    dashed = browser.find_elements(By.CSS_SELECTOR, "#sampling-chart polyline[stroke-dasharray]")
    lines = browser.find_elements(By.CSS_SELECTOR, "#sampling-chart polyline")
    assert len(dashed) == len(lines) // 2 > 0
    assert browser.find_elements(By.CSS_SELECTOR, "#profile polyline.median")


def test_runs_beside_one_another(browser: Browser):
    """Sentences, averages with intervals, and a map of differences whose tip tells one."""
    assert text(browser, "#compared-list li").startswith("2 runs compared with ")
    rows = browser.find_elements(By.CSS_SELECTOR, "#compared-table tr")
    assert len(rows) == 3 and "[" in rows[1].text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#compared-chart circle")) == 2
    lists = Select(browser.find_element(By.ID, "compared-statistic"))
    assert [option.text for option in lists.options] == ["key rank: rank of k_pre", "key rank: rank of k"]
    canvas = browser.find_element(By.CSS_SELECTOR, "#compared-maps canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)  # type: ignore[no-untyped-call]
    ActionChains(browser).move_to_element(canvas).perform()
    assert text(browser, "#tip").startswith("layer ") and "principal components" in text(browser, "#tip")
    picture(browser, "compared")
    lists.select_by_index(1)


def test_attention_of_a_run_is_there_without_an_analysis(browser: Browser):
    Select(browser.find_element(By.ID, "job")).select_by_index(2)
    Select(browser.find_element(By.ID, "analysis")).select_by_value("attention of all sampled queries")
    shown = text(browser, "figure[data-statistic='entropy'] figcaption")
    assert "in nats, mean over queries" in shown and "median" in shown


def test_sections_are_listed_for_the_job_that_has_some(browser: Browser):
    table = browser.find_element(By.ID, "section-table")
    assert not table.is_displayed()
    Select(browser.find_element(By.ID, "job")).select_by_index(1)
    found = [row.text.split() for row in table.find_elements(By.TAG_NAME, "tr")]
    assert found[0] == ["section", "tokens", "q", "k", "v", "q_pre", "k_pre"]
    assert [row[:2] for row in found[1:]] == [["answer", "168"], ["question", "60"]]
    assert found[2][2] == str(2 * HEADS["q"] * 60)  # of two layers, every position
    picture(browser, "sections")


def test_tables_can_be_downloaded(browser: Browser):
    links = browser.find_elements(By.CSS_SELECTOR, "#table-list a")
    names = {link.get_attribute("download") for link in links}
    assert {"0_position_geometry_heads.csv", "0_position_geometry_heads.parquet"} <= names
    assert all(str(link.get_attribute("href")).startswith("data:") for link in links)


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_the_dark(browser: Browser, width: int, scheme: str):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)  # type: ignore[no-untyped-call]
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)  # type: ignore[no-untyped-call]
    wide, seen, paper = browser.execute_script(  # type: ignore[no-untyped-call]
        "return [document.documentElement.scrollWidth, innerWidth, getComputedStyle(document.body).backgroundColor]"
    )
    assert wide <= seen == width
    light = sum(map(int, paper[4:-1].split(","))) > 384
    assert light == (scheme == "light")
    picture(browser, f"{scheme}-{width}")
