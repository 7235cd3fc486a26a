"""Settings of `elastic study`: arms, seeds, and where figures go."""

from dataclasses import dataclass, field

from elastic.config.checks import check_names, require


@dataclass(kw_only=True)
class ArmConfig:
    """One way to train a family: what it changes of the experiment."""

    settings: list[str] = field(default_factory=list)
    """As on the command line of `elastic train`."""
    family_of: str | None = None
    """Another arm, whose frozen members of the same seed are given; null lets the router decide."""
    balanced: bool = False
    """The most balanced members are given: every axis shrinks by about the same factor. Layers drop
    in the order that the first arm has found."""
    each_alone: bool = False
    """Train every smaller member of the first arm's family by itself, with an equal part of the
    tokens."""
    share: float = 1.0
    """Of the tokens that the other arms get."""
    trained: bool = True
    """false measures members as they are cut: one step at no rate."""


@dataclass(kw_only=True)
class StudySettings:
    """What is compared."""

    name: str
    """Of the study, and of the files with its tables."""
    experiment: str = "small"
    """File of conf/experiment/ that the arms change; its parent is trained once."""
    settings: list[str] = field(default_factory=list)
    """Of all arms and of the parent, as on the command line of `elastic train`."""
    arms: dict[str, ArmConfig]
    """All that there are."""
    run: list[str]
    """Names of those that run; the others are compared with the first."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the order of the text, the router's start and its noise; every arm has each of them."""
    share: float = 1.0
    """Of the experiment's elastic tokens, for every arm."""
    families: int = 0
    """Brute force: so many nested families, those that are best without training, are distilled
    beside the one that the first arm freezes; 0 compares arms."""
    sequences: int = 128
    """Of the report text, at most."""
    sequence_length: int = 256
    """Tokens per sequence."""

    def __post_init__(self) -> None:
        check_names("study.arms", self.arms)
        require(bool(self.run), "study.run", self.run, "at least one arm")
        require(bool(self.seeds), "study.seeds", self.seeds, "at least one seed")
        require(min(self.seeds) >= 0, "study.seeds", self.seeds, "at least 0 each")
        for name in self.run:
            require(name in self.arms, "study.run", name, f"one of {', '.join(self.arms)}")
        for values, key in ((self.run, "study.run"), (self.seeds, "study.seeds")):
            require(len(set(values)) == len(values), key, values, "different from one another")
        first = self.run[0]
        for name in self.run:
            arm = self.arms[name]
            require(arm.share > 0, f"study.arms.{name}.share", arm.share, "positive")
            require(
                arm.family_of in (None, first),
                f"study.arms.{name}.family_of",
                arm.family_of,
                f"null, or the first of study.run, {first}",
            )
            require(
                arm.family_of is None or not arm.balanced,
                f"study.arms.{name}.balanced",
                arm.balanced,
                "false with family_of: one of them gives the members",
            )
            follows = [key for key in ("family_of", "each_alone", "balanced") if getattr(arm, key)]
            require(
                name != first or not follows,
                f"study.arms.{name}",
                ", ".join(follows),
                "without these: it is the first of study.run, which the others follow",
            )
        require(0 < self.share <= 1, "study.share", self.share, "in (0, 1]")
        require(self.families >= 0, "study.families", self.families, "at least 0")
        require(
            self.families == 0 or len(self.run) == 1,
            "study.run",
            self.run,
            f"one arm with study.families={self.families}, whose decision is judged",
        )
        for name in ("sequences", "sequence_length"):
            require(getattr(self, name) > 0, f"study.{name}", getattr(self, name), "positive")


@dataclass(kw_only=True)
class StudyConfig:
    """Everything that `elastic study` reads."""

    study: StudySettings
    dir: str
    """The parent, and runs while they last; a run that was stopped goes on from here."""
    results: str
    """Directory of one file per finished run, named by the content of its settings."""
    output: str
    """Directory that gets the table, `<study.name>.md`, and the figures behind it."""
    jobs: int = 1
    """Runs at a time, each a process."""
    threads: int | None = None
    """Of each run; null is torch's own number."""

    def __post_init__(self) -> None:
        require(self.jobs > 0, "jobs", self.jobs, "positive")
        require(self.threads is None or self.threads > 0, "threads", self.threads, "positive")
