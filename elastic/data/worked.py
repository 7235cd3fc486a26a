"""The kinds of problems: what draws a question, works it out and answers it.

Digits are words of their own (`5 3 7`), so that any tokenizer makes a token of each. A trace goes
from one state to the next, so that each token follows from a few that stand near.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Texts = tuple[str, str, str]
"""Question, trace, answer."""


def _digits(number: int, width: int = 0) -> str:
    """537 -> 5 3 7; to a width, with zeros in front."""
    return " ".join(f"{number:0{width}d}")


def _number(digits: Sequence[int]) -> str:
    """The digits without zeros in front."""
    first = next((i for i, digit in enumerate(digits) if digit), len(digits) - 1)
    return " ".join(map(str, digits[first:]))


def _below(rng: random.Random, most_digits: int) -> int:
    """A number of at most so many digits; short ones are as likely as long ones to be drawn."""
    return rng.randrange(10 ** rng.randint(max(1, most_digits - 1), most_digits))


COLUMNS = {
    1: (2, 2),
    2: (2, 3),
    3: (2, 4),
    4: (4, 6),
    5: (5, 7),
    6: (6, 8),
    7: (7, 8),
    8: (8, 9),
}
"""Difficulty -> how many numbers are added or subtracted, and their digits."""


def _columns(first: Sequence[int], second: Sequence[int], sign: int) -> tuple[str, list[int]]:
    """Column by column from the right: `7 + 5 + 0 = 1 2 : 2` has the two digits, the carry, then
    the carry to the next column and this one's digit, then the result so far."""
    lines, result, carry = [], list[int](), 0
    word = "+" if sign > 0 else "-"
    for one, two in zip(reversed(first), reversed(second), strict=True):
        total = one + sign * (two + carry)
        line = f"{one} {word} {two} {word} {carry} ="
        digit, carry = total % 10, abs(total // 10)
        result.insert(0, digit)
        lines.append(f"{line} {carry} {digit} : {' '.join(map(str, result))}")
    if sign > 0 and carry:
        result.insert(0, carry)
    return "\n".join(lines), result


def _folded(numbers: Sequence[int], sign: int) -> Texts:
    """The first number, plus or minus each of the others in turn."""
    word = "+" if sign > 0 else "-"
    question = f" {word} ".join(map(_digits, numbers))
    lines, total = [], [int(digit) for digit in str(numbers[0])]
    for number in numbers[1:]:
        width = max(len(total), len(str(number)))
        first = [0] * (width - len(total)) + total
        second = [int(digit) for digit in f"{number:0{width}d}"]
        lines.append(f"{' '.join(map(str, first))} {word} {' '.join(map(str, second))}")
        worked, result = _columns(first, second, sign)
        total = [int(digit) for digit in _number(result).split()]
        lines += [worked, f"= {_number(total)}"]
    return question, "\n".join(lines), _number(total)


def _addition(rng: random.Random, difficulty: int) -> Texts:
    count, digits = COLUMNS[difficulty]
    question, trace, answer = _folded([_below(rng, digits) for _ in range(count)], 1)
    return f"Add: {question}", trace, answer


def _subtraction(rng: random.Random, difficulty: int) -> Texts:
    count, digits = COLUMNS[difficulty]
    parts = [_below(rng, digits - (count > 2)) for _ in range(count - 1)]
    first = rng.randrange(10**digits)
    if first < sum(parts):
        first = sum(parts) + rng.randrange(10 ** (digits - 1))
    question, trace, answer = _folded([first, *parts], -1)
    return f"Subtract: {question}", trace, answer


COMPARED = {
    1: (1, 2),
    2: (1, 4),
    3: (3, 3),
    4: (11, 5),
    5: (13, 6),
    6: (15, 7),
    7: (18, 8),
    8: (22, 8),
}
"""Difficulty -> how many numbers are held against one, and their digits."""


def _near(rng: random.Random, digits: int, number: int) -> int:
    """Another number of so many digits, which often begins with the same ones."""
    while True:
        other = number % 10**digits // (unit := 10 ** rng.randint(1, digits)) * unit
        other += rng.randrange(unit)
        if other != number:
            return other


def _compare(one: int, two: int, width: int) -> str:
    """`4 7 2 , 4 5 9 : 4 4 = , 7 5 >`: both, then digit by digit from the left, as far as they
    agree and one more."""
    pairs = []
    for a, b in zip(f"{one:0{width}d}", f"{two:0{width}d}", strict=True):
        sign = "=" if a == b else ">" if a > b else "<"
        pairs.append(f"{a} {b} {sign}")
        if a != b:
            break
    return f"{_digits(one, width)} , {_digits(two, width)} : {' , '.join(pairs)}"


def _comparison(rng: random.Random, difficulty: int) -> Texts:
    count, digits = COMPARED[difficulty]
    fixed = rng.randrange(10 ** (digits - 1), 10**digits)
    others = [_near(rng, digits, fixed) for _ in range(count)]
    if count == 1:
        one, two = fixed, others[0]
        trace = _compare(one, two, digits)
        larger = _digits(one if trace.endswith(">") else two)
        return f"Which is larger: {_digits(one)} or {_digits(two)} ?", trace, larger
    lines, larger_count = [], 0
    for other in others:
        worked = _compare(other, fixed, digits)
        larger_count += worked.endswith(">")
        lines.append(f"{worked} : {_digits(larger_count)}")
    question = f"How many are larger than {_digits(fixed)} : {_listed(others)} ?"
    return question, "\n".join(lines), _digits(larger_count)


SORTED = {
    1: (3, 1),
    2: (3, 2),
    3: (5, 2),
    4: (10, 2),
    5: (12, 2),
    6: (12, 3),
    7: (14, 3),
    8: (17, 3),
}
"""Difficulty -> how many numbers are sorted, and their digits."""


def _sorting(rng: random.Random, difficulty: int) -> Texts:
    """Each line has what is sorted and what is left: `2 , 7 : 5 , 1`, then `2 , 5 , 7 : 1`."""
    count, digits = SORTED[difficulty]
    numbers = [rng.randrange(10**digits) for _ in range(count)]
    done, lines = list[int](), []
    for index, number in enumerate(numbers):
        place = next((i for i, other in enumerate(done) if other > number), len(done))
        done.insert(place, number)
        lines.append(f"{_listed(done)} : {_listed(numbers[index + 1 :])}".rstrip())
    return f"Sort: {_listed(numbers)}", "\n".join(lines), _listed(done)


def _listed(numbers: Sequence[int]) -> str:
    return " , ".join(map(_digits, numbers))


@dataclass(frozen=True)
class _Size:
    """Of a program."""

    variables: int
    lines: int
    """Assignments after those that give each variable its first value."""
    rounds: int
    """At most so many of the loop; 0 is no loop."""
    most: int
    """Largest value of a variable."""


PROGRAMS = {
    1: _Size(1, 2, 0, 9),
    2: _Size(2, 2, 0, 19),
    3: _Size(2, 2, 3, 29),
    4: _Size(3, 6, 5, 99),
    5: _Size(3, 10, 8, 99),
    6: _Size(4, 12, 9, 99),
    7: _Size(4, 17, 9, 99),
    8: _Size(5, 21, 9, 99),
}

OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


@dataclass(frozen=True)
class _Assignment:
    """A line of a program: target = left sign right, where right is a variable or a number."""

    target: str
    left: str
    sign: str
    right: str | int

    def __str__(self) -> str:
        return f"{self.target} = {self.left} {self.sign} {self.right}"

    def operands(self, state: Mapping[str, int]) -> tuple[int, int]:
        right = self.right
        return state[self.left], state[right] if isinstance(right, str) else right

    def value(self, state: Mapping[str, int]) -> int:
        return OPERATIONS[self.sign](*self.operands(state))

    def run(self, state: dict[str, int]) -> str:
        """Do it; the values put in with the result, and all variables."""
        one, two = map(_digits, self.operands(state))
        state[self.target] = self.value(state)
        done = f"{one} {self.sign} {two} = {_digits(state[self.target])}"
        return f"{done} : {_shown(state)}"


def _assignment(
    rng: random.Random, state: Mapping[str, int], most: int, rounds: int = 1
) -> _Assignment:
    """A line that can run so many times with values from 0 to `most`."""
    names = list(state)
    while True:
        left = rng.choice(names)
        target = left if rounds > 1 else rng.choice(names)  # else later rounds do nothing new
        right = rng.choice(names) if rng.random() < 0.5 else rng.randrange(1, 10)
        line = _Assignment(target, left, rng.choice("++--*"), right)
        trial = dict(state)
        for _ in range(rounds):
            trial[target] = line.value(trial)
            if not 0 <= trial[target] <= most:
                break
        else:
            return line


def _program(rng: random.Random, difficulty: int) -> Texts:
    """Numbered assignments, then one that is repeated. A line of the trace has the line that is run
    with its number, the values put in with the result, and all variables."""
    size = PROGRAMS[difficulty]
    names = "abcde"[: size.variables]
    state = {name: rng.randrange(10) for name in names}
    code = [f"{number} . {name} = {state[name]}" for number, name in enumerate(names, 1)]
    worked = [_shown(state)]
    target = rng.choice(names)
    for number in range(len(names) + 1, len(names) + 1 + size.lines):
        line = _assignment(rng, state, size.most)
        code.append(f"{number} . {line}")
        worked.append(f"{code[-1]} : {line.run(state)}")
    if size.rounds:
        rounds = rng.randint(2, size.rounds)
        line = _assignment(rng, state, size.most, rounds)
        code.append(f"repeat {rounds} . {line}")
        worked += [f"repeat {done} . {line} : {line.run(state)}" for done in range(1, rounds + 1)]
        target = line.target
    question = "\n".join([*code, f"print {target}"])
    return f"Run:\n{question}", "\n".join(worked), _digits(state[target])


def _shown(state: Mapping[str, int]) -> str:
    return " , ".join(f"{name} = {_digits(value)}" for name, value in state.items())


WORKED: Mapping[str, Callable[[random.Random, int], Texts]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "comparison": _comparison,
    "sorting": _sorting,
    "program": _program,
}
"""Kind of problem -> what draws one of a difficulty."""
