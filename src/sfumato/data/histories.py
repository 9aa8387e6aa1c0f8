"""Case histories of the phantom clinic: the same facts in many plain sentences, in English, Russian and Chinese.

Every history states side, zone, kind, size, heart, effusion and view; some say what is absent ("no effusion"). The
remarks that matter nothing (smoking, allergies, work) never use the words of the facts, so that a sentence about the
left lung is always about the picture's left lung.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

T = TypeVar("T")
SLOTS = 12  # of the numbers that choose the phrasing
Options = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrases:
    """One language. Braces name what is filled in; the keys of the inner mappings are the labels of the facts."""

    openings: Options
    sexes: tuple[tuple[str, str], tuple[str, str]]  # (male, female), each (noun, pronoun)
    complaints: Options
    durations: Options
    remarks: Options
    findings: Options
    sizes: Options
    words: dict[str, dict[str, Options]]  # fact -> label -> wordings that fit ``findings``
    heart: dict[str, Options]
    effusion: dict[str, Options]
    sound: str
    murmur: tuple[str, str]
    wheeze: tuple[str, str]
    joiner: str = " "


ENGLISH = Phrases(
    openings=(
        "{A} {age}-year-old {sex} with {complaint} {duration}.",
        "{A} {age}-year-old {sex} presents with {complaint} {duration}.",
        "The patient is {a} {age}-year-old {sex} who reports {complaint} {duration}.",
        "{Sex}, {age}, {complaint} {duration}.",
        "{Complaint} {duration} in {a} {age}-year-old {sex}.",
        "Seen today: {sex}, {age} years old. {Complaint} {duration}.",
    ),
    sexes=(("man", "he"), ("woman", "she")),
    complaints=(
        "a dry cough", "a cough with sputum", "fever and chills", "shortness of breath", "chest pain on breathing in",
        "night sweats", "weight loss", "tiredness", "hoarseness", "a cold that does not go away",
    ),
    durations=("for three days", "for a week", "for two weeks", "for a month", "since spring", "for half a year"),
    remarks=(
        "Smokes ten cigarettes a day.", "Never smoked.", "Allergic to penicillin.", "Works as a teacher.",
        "Works in a bakery.",
        "Takes tablets for blood pressure.", "Diabetes, well controlled.", "Travelled abroad last year.",
        "Lives alone with a cat.",
        "Appetite is good.", "No fever this morning.", "Blood count is unremarkable.", "{Pronoun} sleeps well.",
        "Vaccinated last autumn.",
    ),
    findings=(
        "{View} chest film: {a_size} {kind} in the {side} {zone} zone.",
        "The {view} view shows {a_size} {kind} in the {zone} zone of the {side} lung.",
        "On the {view} film there is {a_size} {kind}, {side} {zone} zone.",
        "{View} view. {A_size} {kind} lies in the {side} lung, {zone} zone.",
        "There is {a_size} {kind} in the {side} {zone} zone on the {view} film.",
        "{Side} {zone} zone: {kind}, {size}. {View} view.",
    ),
    sizes=("{cm} cm", "{mm} mm"),
    words={
        "side": {"left": ("left",), "right": ("right",)},
        "zone": {"upper": ("upper",), "middle": ("middle", "mid"), "lower": ("lower",)},
        "kind": {
            "nodule": ("nodule", "round nodule", "solid nodule"),
            "consolidation": ("consolidation", "patchy consolidation", "area of consolidation"),
            "cavity": ("cavity", "ring-shaped cavity", "thick-walled cavity"),
        },
        "view": {"frontal": ("frontal",), "lateral": ("lateral",)},
    },
    heart={
        "normal": (
            "The heart is normal in size.", "Heart size is normal.", "Heart not enlarged.",
            "The heart is not enlarged.", "Normal heart.",
        ),
        "enlarged": (
            "The heart is enlarged.", "Enlarged heart.", "Heart size is increased.", "There is an enlarged heart.",
            "Marked cardiomegaly.",
        ),
    },
    effusion={
        "none": (
            "No effusion.", "No pleural effusion.", "There is no effusion.", "Without effusion.", "No pleural fluid.",
        ),
        "present": (
            "Pleural effusion on the same side.", "A pleural effusion is present.", "There is a pleural effusion.",
            "With pleural effusion.", "Pleural fluid at the base.",
        ),
    },
    sound="On auscultation {rate} beats a minute, {murmur}, {wheeze}.",
    murmur=("no murmur", "a systolic murmur"),
    wheeze=("no wheeze", "a wheeze on breathing out"),
)  # fmt: skip

RUSSIAN = Phrases(
    openings=(
        "{Sex}, {age} {years}, жалобы: {complaint} {duration}.",
        "{Sex} {age} {years_of}; {complaint} {duration}.",
        "На приёме {sex}, {age} {years}. Беспокоит: {complaint} {duration}.",
        "{Complaint} {duration}. {Sex}, {age} {years}.",
    ),
    sexes=(("мужчина", "он"), ("женщина", "она")),
    complaints=(
        "сухой кашель", "кашель с мокротой", "жар и озноб", "одышка", "боль в груди на вдохе", "ночная потливость",
        "потеря веса",
        "усталость", "осиплость", "затянувшаяся простуда",
    ),
    durations=("три дня", "неделю", "две недели", "месяц", "с весны", "полгода"),
    remarks=(
        "Курит десять сигарет в день.", "Никогда не курил{f}.", "Аллергия на пенициллин.", "Работает в школе.",
        "Принимает таблетки от давления.",
        "Диабет, компенсирован.", "В прошлом году ездил{f} за границу.", "Живёт с кошкой.", "Аппетит хороший.",
        "Утром без жара.",
        "Анализ крови без особенностей.", "Привит{f} осенью.",
    ),
    findings=(
        "{View} снимок: {kind} {size} в {zone} зоне {side} лёгкого.",
        "{View} проекция: в {zone} зоне {side} лёгкого {kind}, {size}.",
        "В {zone} зоне {side} лёгкого видна тень: {kind}, {size}. {View} снимок.",
        "{Kind} {size}, {zone_is} зона {side} лёгкого; {view} проекция.",
    ),
    sizes=("{cm} см", "{mm} мм"),
    words={
        "side": {"left": ("левого",), "right": ("правого",)},
        "zone": {"upper": ("верхней",), "middle": ("средней",), "lower": ("нижней",)},
        "zone_is": {"upper": ("верхняя",), "middle": ("средняя",), "lower": ("нижняя",)},
        "kind": {
            "nodule": ("узел", "округлый узел", "плотный узел"),
            "consolidation": ("инфильтрат", "очаговый инфильтрат", "участок уплотнения"),
            "cavity": ("полость", "кольцевидная полость", "полость с толстой стенкой"),
        },
        "view": {"frontal": ("прямой", "прямая"), "lateral": ("боковой", "боковая")},
    },
    heart={
        "normal": ("Сердце не увеличено.", "Размеры сердца обычные.", "Сердце нормальных размеров."),
        "enlarged": ("Сердце увеличено.", "Сердце расширено.", "Увеличенное сердце."),
    },
    effusion={
        "none": ("Выпота нет.", "Без выпота.", "Плеврального выпота нет.", "Жидкости в плевре нет."),
        "present": (
            "Есть плевральный выпот.", "На той же стороне плевральный выпот.", "В плевре жидкость.", "Имеется выпот.",
        ),
    },
    sound="При аускультации {rate} ударов в минуту, {murmur}, {wheeze}.",
    murmur=("шума нет", "систолический шум"),
    wheeze=("хрипов нет", "свистящие хрипы на выдохе"),
)  # fmt: skip

CHINESE = Phrases(
    openings=(
        "{sex}，{age}岁，{complaint}{duration}。",
        "患者{sex}，{age}岁，主诉{complaint}{duration}。",
        "{age}岁{sex}，因{complaint}{duration}就诊。",
        "{complaint}{duration}。{age}岁{sex}患者。",
    ),
    sexes=(("男性", "他"), ("女性", "她")),
    complaints=(
        "干咳", "咳嗽伴痰", "发热畏寒", "气短", "吸气时胸痛", "盗汗", "体重下降", "乏力", "声音嘶哑", "感冒久治不愈",
    ),
    durations=("三天", "一周", "两周", "一个月", "两个月", "半年"),
    remarks=(
        "每天吸烟十支。", "从不吸烟。", "青霉素过敏。", "职业为教师。", "服用降压药。",
        "糖尿病，控制良好。", "去年出国旅行。", "独居，养猫。",
        "食欲好。", "今晨无发热。", "血常规无特殊。", "去年秋天接种疫苗。",
    ),
    findings=(
        "{view}胸片：{side}肺{zone}野{kind}，{size}。",
        "{view}片示{side}肺{zone}野有{size}{kind}。",
        "{side}肺{zone}野见{kind}，大小{size}，{view}片。",
        "{view}片上{side}{zone}肺野可见{kind}，{size}。",
    ),
    sizes=("{cm}厘米", "{mm}毫米"),
    words={
        "side": {"left": ("左",), "right": ("右",)},
        "zone": {"upper": ("上",), "middle": ("中",), "lower": ("下",)},
        "kind": {
            "nodule": ("结节", "圆形结节", "实性结节"),
            "consolidation": ("实变", "片状实变", "实变影"),
            "cavity": ("空洞", "环形空洞", "厚壁空洞"),
        },
        "view": {"frontal": ("正位",), "lateral": ("侧位",)},
    },
    heart={
        "normal": ("心影不大。", "心脏大小正常。", "心脏未见增大。"),
        "enlarged": ("心影增大。", "心脏增大。", "心脏明显增大。"),
    },
    effusion={
        "none": ("无胸腔积液。", "未见积液。", "没有胸水。", "无积液。"),
        "present": ("有胸腔积液。", "同侧胸腔积液。", "可见积液。", "伴胸水。"),
    },
    sound="听诊心率每分钟{rate}次，{murmur}，{wheeze}。",
    murmur=("无杂音", "有收缩期杂音"),
    wheeze=("无哮鸣音", "呼气时有哮鸣音"),
    joiner="",
)  # fmt: skip

LANGUAGES = {"en": ENGLISH, "ru": RUSSIAN, "zh": CHINESE}
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0))  # of finding, heart, effusion


def tell(
    language: str,
    *,
    age: int,
    female: bool,
    facts: dict[str, str],
    size_mm: int,
    words: Sequence[float],
    sound: tuple[int, bool, bool] | None = None,
) -> str:
    """One history. Args: words: SLOTS numbers in [0, 1) that choose the phrasing; sound: (rate, murmur, wheeze)."""
    phrases = LANGUAGES[language]
    noun, pronoun = phrases.sexes[female]
    fill = {
        "age": str(age),
        "sex": noun,
        "Sex": _capital(noun),
        "complaint": (complaint := _choose(phrases.complaints, words[2])),
        "Complaint": _capital(complaint),
        "duration": _choose(phrases.durations, words[3]),
        "Pronoun": _capital(pronoun),
    }
    if language == "en":
        fill["a"] = "an" if age in (11, 18) or 80 <= age < 90 else "a"
        fill["A"] = fill["a"].capitalize()
    elif language == "ru":
        fill["years"] = _russian_years(age)
        fill["years_of"] = "года" if age % 10 == 1 and age != 11 else "лет"
        fill["f"] = "а" if female else ""
    parts = [_choose(phrases.openings, words[1]).format_map(fill)]
    if words[4] < 0.6:
        parts.append(_choose(phrases.remarks, words[4] / 0.6).format_map(fill))
    finding = _finding(phrases, language, facts, size_mm, words)
    heart = _choose(phrases.heart[facts["heart"]], words[6])
    effusion = _choose(phrases.effusion[facts["effusion"]], words[7])
    three = (finding, heart, effusion)
    parts += [three[i] for i in _choose(_ORDERS, words[8])]
    if sound is not None:
        rate, murmur, wheeze = sound
        parts.append(phrases.sound.format(rate=rate, murmur=phrases.murmur[murmur], wheeze=phrases.wheeze[wheeze]))
    return phrases.joiner.join(parts)


def pieces(language: str) -> tuple[str, ...]:
    """The words of a language's phrase book as pieces for a list of words: with a space before, with a capital, and digits.

    Of the phrases alone, not of any history: public.
    """
    found = set()
    for phrase in _strings([getattr(LANGUAGES[language], f.name) for f in fields(Phrases)]):
        for word in re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", re.sub(r"{[^}]*}", " ", phrase)):
            found |= {f" {word}", _capital(word)}
    found |= {f" {digit}" for digit in range(10)} | {"-year-old", " cm", " mm", ". "}
    return tuple(sorted(piece for piece in found if len(piece.encode()) > 1))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _strings(part)


def _finding(phrases: Phrases, language: str, facts: dict[str, str], size_mm: int, words: Sequence[float]) -> str:
    template = int(words[5] * len(phrases.findings))
    size = phrases.sizes[int(words[9] * len(phrases.sizes))].format(cm=_centimetres(size_mm, language), mm=size_mm)
    fill = {"size": size}
    for name, wordings in phrases.words.items():
        options = wordings[facts["zone" if name == "zone_is" else name]]
        fill[name] = options[int(words[10] * len(options))]
    if language == "ru":  # the two nouns of the templates, film and projection, have different genders
        fill["view"] = phrases.words["view"][facts["view"]]["проекция" in phrases.findings[template]]
    if language == "en":
        fill["a_size"] = ("an " if size[0] == "8" else "a ") + size
        fill["A_size"] = _capital(fill["a_size"])
    for name in ("view", "side", "kind"):
        fill[name.capitalize()] = _capital(fill[name])
    return phrases.findings[template].format_map(fill)


def _choose(options: tuple[T, ...], u: float) -> T:
    return options[int(u * len(options))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _centimetres(size_mm: int, language: str) -> str:
    text = f"{size_mm / 10:.1f}".removesuffix(".0")
    return text.replace(".", ",") if language == "ru" else text


def _russian_years(age: int) -> str:
    if age % 10 == 1 and age % 100 != 11:
        return "год"
    return "года" if age % 10 in (2, 3, 4) and age % 100 not in (12, 13, 14) else "лет"
