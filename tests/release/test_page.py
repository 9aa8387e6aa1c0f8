"""The report is one page that needs nothing else, says everything the run knows, and what it does not know."""

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.release.conftest import PLAN

from sfumato.errors import PrivacyRefused, UsageError
from sfumato.privacy import accounting
from sfumato.privacy.accounting import Event
from sfumato.privacy.plan import NotPrivate
from sfumato.release import charts, page, provenance, wording

NOT_PRIVATE = NotPrivate(population=30_000, expected_batch_size=2_048.0, steps=800, unit="person", records_per_unit=4)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Outline(html.parser.HTMLParser):
    """Checks that tags close in order, and collects ids, links and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values["href"] or ""] if "href" in values else []
        self.addresses += [values["src"] or ""] if "src" in values else []
        assert not any(name.startswith("on") for name in values)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(text: str) -> Outline:
    parsed = Outline()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    return parsed


def words(text: str) -> str:
    return re.sub(r"[ \n]+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)))


@pytest.mark.parametrize("public", [False, True])
def test_the_page_needs_no_network_no_script_and_no_other_file(public: bool, run: Path) -> None:
    text = page.render(run, public=public)
    parsed = outline(text)
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert len(parsed.addresses) == 8
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    assert not re.search(r"https?:|url\(|@import|@font-face", text)


def test_the_internal_page_holds_every_section_and_figure(run: Path) -> None:
    text = words(page.render(run))
    for part in (
        "ε = 8",
        "3.2 × 10⁻⁶",
        "one person is added or removed",
        "30\u202f000 persons",
        "kappa",
        "0.810",
        "0.980",
        "0.931",
        "Twin",
        "Consistent",
        "denoising loss",
        "0.5077",
        "0.8812",
        "positive control",
        "without seeing the model",
        "3 min 52 s",
        "489\u202f216",
        "Inside: every training step",
        "What is not promised",
        "sfumato verify",
        "step 800",
        "Internal version",
        "nearest training record",
    ):
        assert part in text, part


def test_the_public_page_holds_no_internal_figure(run: Path) -> None:
    for text in (page.render(run, public=True), json.dumps(page.as_json(run, public=True))):
        for internal in (
            "0.931",
            "Twin",
            "0.5077",
            "0.8812",
            "Consistent",
            "CONSISTENT",
            "2.912",
            "0.2718",
            "7071",
            "74\u202f913",
            "74913",
            "231.7",
            "3 min 52",
            "/srv/",
            '"loss"',
            "0.0131",
            "1.31 %",
        ):
            assert internal not in text, internal
    text = words(page.render(run, public=True))
    assert "Public version" in text
    assert "denoising loss, beside an attacker who never sees the model" in text
    assert "One bit does leave" in text
    assert "Left in the run, because nothing covers it" in text


def test_the_public_trajectory_comes_from_the_plan_and_ends_at_the_claim(run: Path) -> None:
    """The log beside it holds other values, and is internal."""
    points = page.as_json(run, public=True)["trajectory"]
    assert points != page.as_json(run)["trajectory"]
    assert points == sorted(points)
    assert points[-1] == [800, pytest.approx(7.99915, abs=1e-4)]
    assert points[0] == [0, 0.0] and len(points) == 1 + page.POINTS


def test_a_run_without_privacy_says_so_in_large_and_has_no_public_page(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", plan=NOT_PRIVATE)
    text = page.render(run)
    assert '<div class="banner" role="alert"><strong>This run has no privacy guarantee.' in text
    assert "budget ε" not in text
    assert "None. There is no number" in words(text)
    with pytest.raises(PrivacyRefused) as error:
        page.render(run, public=True)
    assert error.value.exit_code == 3


def test_a_run_not_for_release_says_why_and_has_no_public_page(run: Path) -> None:
    path = run / "reports/privacy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "not_for_release": "the noise came from a seed"}))
    assert "Not for release.</strong><p>the noise came from a seed" in page.render(run)
    with pytest.raises(PrivacyRefused, match="the noise came from a seed"):
        page.as_json(run, public=True)


def test_a_claim_that_an_audit_refuted_is_not_published(run: Path) -> None:
    path = run / "reports/audit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "VIOLATION"}))
    assert "Violation" in words(page.render(run))
    with pytest.raises(PrivacyRefused) as error:
        page.render(run, public=True)
    assert error.value.code == "audit_violation"


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("reports/privacy.json", "finish the training with sfumato train --resume"),
        ("reports/quality.json", "run sfumato evaluate on this run"),
        ("reports/audit.json", "run sfumato audit on this run"),
        ("reports/cost.json", "Cost was not written yet"),
        ("samples/real.png", "no grid of real public examples"),
        ("samples", "There are no pictures yet"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(gone: str, says: str, run: Path) -> None:
    path = run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = page.render(run)
    outline(text)
    assert says in re.sub(r" +([.,])", r"\1", words(text))


def test_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    text = page.render(tmp_path / "v1")
    outline(text)
    assert set(page.as_json(tmp_path / "v1")["missing"]) == {"privacy", "quality", "audit", "cost"}
    with pytest.raises(UsageError):
        page.render(tmp_path / "v2")


def test_a_federation_shows_each_sites_epsilon_and_not_its_losses_in_public(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", federation=True)
    text = words(page.render(run))
    for part in ("north", "6.483", "river", "7.932", "hill", "7.119", "11\u202f900", "3 rounds"):
        assert part in text, part
    assert "protected by that site's ε" in text.replace("’", "'")
    public = page.as_json(run, public=True)["federation"]
    assert public["rounds"] == 3
    assert "0.9141" not in json.dumps(public)
    assert "Round by round" not in page.render(run, public=True)
    outline(page.render(run, public=True))
    path = run / "reports/federation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unit": "site", "trust": "central: the server"}))
    for edition in (False, True):
        text = words(page.render(run, public=edition))
        assert "Who is trusted: central: the server." in text
        assert "Refused Units" in text  # a site's row has its units, not a number of sites


@pytest.mark.parametrize(
    ("adjacency", "neighbours", "lead"),
    [
        ("add_or_remove", "one person is added or removed", "Whether or not any one person took part"),
        ("zero_out", "one person gives its data, or none", "Whether or not any one person took part"),
        (
            "replace_one",
            "the data of one person are replaced by any others",
            "Whatever the data of any one person were",
        ),
    ],
)
def test_neighbours_are_said_in_words(adjacency: str, neighbours: str, lead: str, run: Path) -> None:
    path = run / "reports/privacy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adjacency": adjacency}))
    text = words(page.render(run))
    assert neighbours in text and lead in text and "_one" not in text and "zero_out" not in text


def test_long_labels_of_a_scale_stand_beside_its_name_and_rounds_are_whole() -> None:
    drawn = charts.looks([[0, 978.913], [1, 978.4], [2, 978.21]], unit="round")
    ends = [float(x) for x in re.findall(r'class="tick end" x="([^"]+)"', drawn)]
    labels = re.findall(r'class="tick end"[^>]*>([^<]+)<', drawn)
    assert max(map(len, labels)) >= 5
    assert all(x - 7 * len(label) > 20 for x, label in zip(ends, labels, strict=True))  # the name is at 13, turned
    assert re.findall(r'class="tick middle"[^>]*>([^<]+)<', drawn) == ["0", "1", "2"]


def test_a_federation_is_told_round_by_round(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", federation=True)
    shown = page.render(run)
    outline(shown)
    text = words(shown)
    for part in (
        "81.41", "0.63",  # quality and agreement
        "2.161", "4.321", "6.481", "4.411",  # of one site after each round, and the largest
        "5.871", "1.914", "2 of 3",  # bytes, seconds, sites
        "98.8 -0.73",  # what a site sent, and whether it agreed with the others
        "said no after 0.9141", "budget_exhausted",
        "κ, as asked against read", "cost: MB sent so far, both ways",
    ):  # fmt: skip
        assert part in text, part


def test_the_balance_has_a_dot_for_each_round_and_falls_back_to_what_there_is(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", federation=True)
    path = run / "reports" / "federation.json"
    report = json.loads(path.read_text())

    def chart() -> str:
        path.write_text(json.dumps(report))
        return (re.findall(r'<svg class="chart"[^>]*round by round.*?</svg>', page.render(run)) or [""])[0]

    assert chart().count('class="dot"') == 3
    heights = [float(y) for y in re.findall(r'class="dot" cx="[^"]+" cy="([^"]+)"', chart())]
    assert heights == sorted(heights, reverse=True)  # better is higher
    for number in report["rounds"]:
        number["epsilon"] = None
        del number["bytes_up"], number["quality"]["kappa_mean"]
    assert "loss on public records" in chart() and "ε spent" not in chart() and "MB" not in chart()
    report["rounds"][1:] = []
    assert chart() == ""


def test_whatever_a_report_says_is_text_and_not_markup(run: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'</style>"
    for name, edit in {
        "quality": lambda v: v["figures"][0].update(name=attack, note=attack, extractor=attack),
        "audit": lambda v: (v.update(because=attack, notes=[attack]), v["attacks"][0].update(name=attack)),
        "privacy": lambda v: v.update(boundary=[attack], not_promised=[attack]),
        "cost": lambda v: v.update(machine=attack),
    }.items():
        path = run / "reports" / f"{name}.json"
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))
    (run / "samples/captions.json").write_text(json.dumps([attack]))
    (run / "data_card.json").write_text(json.dumps({"name": attack, "what": [attack], "facts": {attack: [attack]}}))
    for public in (False, True):
        parsed = outline(page.render(run, public=public))
        assert not parsed.tags & {"script"}
        assert all(address.startswith("data:image/png") for address in parsed.addresses)


def test_a_torn_log_and_what_is_no_picture_do_not_stop_the_page(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 805, "eps')
    (run / "samples/final.png").write_bytes(b"not a picture")
    assert page.as_json(run)["trajectory"][-1] == [800, 8.0]
    assert "final.png is too large or no PNG" in words(page.render(run))


def test_the_json_holds_the_values_of_the_page_and_is_plain_json(run: Path) -> None:
    values = page.as_json(run)
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["guarantee"]["epsilon"] == pytest.approx(7.99915, abs=1e-4)
    assert values["audit"]["verdict"] == "CONSISTENT"
    assert values["pictures"]["steps"][0] == "step-000000.png"
    assert values["pictures"]["steps"][-1] == "step-000800.png"
    assert values["missing"] == {}


def test_what_an_attacker_may_reach_is_the_bound_of_the_claim() -> None:
    """Kairouz et al. 2015, Theorem 2.1: e * 0.01 + 1e-6 for epsilon = 1; near 1 the other side of the bound decides."""
    assert page._detection({"epsilon": 1.0, "delta": 1e-6})[0] == (0.01, pytest.approx(2.718281828 * 0.01 + 1e-6))
    assert page._detection({"epsilon": 8.0, "delta": 1e-6})[0][1] == pytest.approx(1 - 0.00033546 * 0.99, abs=1e-7)
    curve = [[1e-6, 8.0], [1e-3, 3.0]]
    assert page._detection({"epsilon": 8.0, "delta": 1e-6, "curve": curve})[0][1] == pytest.approx(
        20.0855 * 0.01 + 1e-3, abs=1e-5
    )
    assert page._posterior({"epsilon": 0.0}) == 0.5


# ---- charts and words ----


def test_charts_place_the_last_point_at_the_right_and_the_budget_above_it() -> None:
    text = charts.trajectory([[10, 1.0], [100, 4.0]], budget=8.0, planned_steps=100)
    dot = re.search(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', text)
    limit = re.search(r'<line class="limit"[^>]* y1="([\d.]+)"', text)
    assert dot is not None
    assert limit is not None
    assert float(dot.group(1)) == charts.WIDTH - charts.RIGHT
    assert float(limit.group(1)) < float(dot.group(2))
    outline(text)


@pytest.mark.parametrize(
    "text",
    [
        charts.curve([[1e-9, 10.0], [1e-3, 5.0]], at=(1e-6, 8.0)),
        charts.curve([[1e-6, 0.0], [2e-6, 0.0]], at=None),
        charts.roc({"a<b": [[0.0, 0.0], [0.001, 0.01], [1.0, 1.0]], "none": [[0.0, 0.0]]}, floor=0.001),
        charts.trajectory([[1, 0.0]], budget=None, planned_steps=None),
        charts.row(0.5, None, None, {"chance": 0.1, "real held-out": 2.0}, (0.0, 1.0)),
        charts.row(0.0, 0.0, 0.0, {}, (0.0, 0.0)),
        charts.bar(3.0, 0.0),
    ],
)
def test_charts_are_whole_markup_without_nonsense_numbers(text: str) -> None:
    outline(text)
    assert not re.search(r"nan|inf\b|None", text)


def test_points_outside_a_scale_stay_on_it() -> None:
    text = charts.row(5.0, -3.0, 9.0, {"real held-out": -1.0}, (0.0, 1.0))
    assert {float(share) for share in re.findall(r'x[12]?="([\d.-]+)%"', text)} == {0.0, 100.0}


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (wording.duration(0.25), "0.2 s"),
        (wording.duration(59.6), "60 s"),
        (wording.duration(231.7), "3 min 52 s"),
        (wording.duration(7199.9), "2 h 00 min"),
        (wording.duration(None), "unknown"),
        (wording.size(1234567890), "1.15 GiB"),
        (wording.size(0), "0 B"),
        (wording.size(5 * 2**50), "5.12e+03 TiB"),
        (wording.percent(0.9996646), "99.966 %"),
        (wording.percent(1.0), "100 %"),
        (wording.percent(0.001), "0.1 %"),
        (wording.small(3.2e-6), "3.2 × 10⁻⁶"),
        (wording.small(None), wording.number(None)),
        (wording.count(30000), "30\u202f000"),
        (wording.number(None), "none"),
        (wording.figure(0.5), "0.500"),
        (wording.figure(61.271), "61.27"),
    ],
)
def test_numbers_read_well(shown: str, text: str) -> None:
    assert shown == text


# ---- in a browser ----


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_in_a_browser_the_page_is_quiet_fits_its_width_and_can_be_read(
    scheme: Any, width: int, run: Path, tmp_path: Path
) -> None:
    """No request, no message, no sideways scrolling, and text at a contrast of 4.5 or more (WCAG 2.1, 1.4.3)."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    (tmp_path / "report.html").write_text(page.render(run), encoding="utf-8")
    noise: list[str] = []
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on(
            "request",
            lambda request: noise.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        tab.goto((tmp_path / "report.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        colours = tab.evaluate(
            "(() => { const s = getComputedStyle(document.documentElement); return ['paper', 'ink', 'soft', 'accent',"
            " 'warn', 'second', 'good'].map(name => s.getPropertyValue('--' + name).trim()); })()"
        )
        browser.close()
    assert noise == []
    paper, *inks = (_luminance(colour) for colour in colours)
    for ink in inks:
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.0
    assert (max(paper, inks[1]) + 0.05) / (min(paper, inks[1]) + 0.05) >= 4.5


def _luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.1)."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---- provenance ----


def test_provenance_names_code_dependencies_recipe_and_data(run: Path) -> None:
    found = provenance.collect(run)
    assert found["recipe"]["name"] == "clinic"
    assert found["data_card"]["records"] == 74_913
    assert "numpy" in found["dependencies"]
    assert set(found["code"]) == {"name", "version", "commit", "changed_since_commit"}


def test_a_commit_of_somebody_elses_repository_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed below a folder that is under version control, we are not tracked there."""
    asked: list[tuple[str, ...]] = []

    def git(folder: Path, *arguments: str) -> str | None:
        asked.append(arguments)
        return None if arguments[0] == "ls-files" else "0" * 40

    monkeypatch.setattr(provenance, "_git", git)
    assert provenance.code_version()["commit"] is None
    assert [arguments[0] for arguments in asked] == ["ls-files"]


def test_the_taint_list_names_every_tensor_and_file(run: Path) -> None:
    listed = provenance.write_taint(run, lambda file, tensor: "public" if file == "text.safetensors" else "dp-sgd")
    assert listed["tensors"]["text.safetensors"] == {"buckets": "public"}
    assert listed["tensors"]["unet/diffusion_pytorch_model.safetensors"] == {
        "down.bias": "dp-sgd",
        "down.weight": "dp-sgd",
    }
    assert listed["files"] == {"model_index.json": "constant", "unet/config.json": "constant"}
    found, unsafe = provenance.model_files(run / "model")
    assert unsafe == []
    assert provenance.taint_problems(listed, found) == []
    assert provenance.taint_problems(None, found) == ["the taint list is missing or malformed"]


# ---- other runs on the same account ----


def other(name: str, event: Event, **changed: Any) -> dict[str, Any]:
    """As an account describes a run."""
    said = {"run": name, "ledger": "5f", "private": True, "unit": "person", "records_per_unit": 4, "delta": 3.2e-6}
    said |= {"adjacency": "add_or_remove", "events": [event.to_dict()]}
    return {**said, "epsilon": accounting.epsilon([event], 3.2e-6), **changed}


def composed(run: Path, others: list[dict[str, Any]]) -> str:
    """The part of the page about other runs, as text with bars between cells."""
    path = run / "reports/privacy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "composed_with": others}))
    found = page.render(run).split("Other runs on the same data", 1)[1].split("</table>", 1)[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "|", found))


def test_other_runs_stand_in_a_table_each_alone_and_all_together(run: Path) -> None:
    steps = Event(sampling_rate=0.05, noise_multiplier=2.0, count=600)
    mean = Event(mechanism="gaussian", sampling_rate=1.0, noise_multiplier=20.0)
    said = composed(run, [other("clinic/v0", steps), other("sketch/v1", mean)])
    own = PLAN.event()
    together = accounting.epsilon([steps, mean, own], 3.2e-6, "rdp")
    assert together is not None and together > 8
    for words in (
        "|clinic/v0|", "|sampled Gaussian, q = 0.05, σ = 2|", "|600|", f"|{wording.bound(accounting.epsilon([steps], 3.2e-6))}|",
        "|sketch/v1|", "|Gaussian on all units, σ = 20|", "This run", "|sampled Gaussian, q = 0.0683, σ = 1.43|",
        "All together", f"|{wording.bound(together)}|", "as if all plans had been fixed beforehand",
    ):  # fmt: skip
        assert words in said, (words, said)
    assert "noise_multiplier" not in said and "{" not in said


def test_runs_that_have_no_figure_together_say_why(run: Path) -> None:
    steps = Event(sampling_rate=0.05, noise_multiplier=2.0, count=600)
    assert "its runs differ in unit (person, record)" in composed(run, [other("a", steps, unit="record")])
    free = other("free", steps, private=False, events=[], epsilon=None, delta=None)
    said = composed(run, [free])
    assert "a run without privacy is among its runs" in said and "none: not private" in said
    (run / "ledger.db").unlink()
    assert "this run&#39;s ledger cannot be read" in composed(run, [other("a", steps)])


def test_a_run_alone_on_its_account_has_no_such_table(run: Path) -> None:
    assert "Other runs on the same data" not in page.render(run)
