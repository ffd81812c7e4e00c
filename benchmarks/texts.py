"""Chat prompts in plain English, put together from sentences written for this purpose.

Three kinds, by how long the prompt shall be: a question, a task with some details, and an article
with a task. The same random generator state gives the same text.
"""

from random import Random


def _items(text: str) -> list[str]:
    """The parts of a text between its bars and line ends."""
    return text.strip().replace("\n", "|").split("|")


TOPICS = _items("""
photosynthesis|the water cycle|a suspension bridge|compound interest|sourdough bread|tidal power|a vaccine
the printing press|plate tectonics|a diesel engine|honey bees|inflation|a lunar eclipse|the immune system
vertical farming|a heat pump|jet lag|migration in birds|noise insulation|a balanced budget|recycling glass
composting|a rechargeable battery|map projections|the silk road|coral reefs|a jury|supply and demand
hand washing|optical fibre|a sundial|soil erosion|the postal service|public libraries|crop rotation
a barometer|steam locomotives|the periodic table|antibiotics|a telescope|wetlands|double-entry bookkeeping
a lighthouse|time zones|rainwater harvesting|peer review|a compass|fermentation|urban trees
the greenhouse effect|elevators
""")

QUESTIONS = _items("""
What is {topic}, in one sentence?|How would you explain {topic} to a curious ten-year-old?
Give me three surprising facts about {topic}.|Why does {topic} matter in everyday life?
Write a short poem about {topic}.|List the five most important words for talking about {topic}.
Name two common misunderstandings about {topic} and correct them.|What came before {topic}?
Describe {topic} without using the letter z.|Who should learn about {topic}, and why?
Suggest a title for a talk about {topic}.|What is the first thing to know about {topic}?
Compare {topic} with {other}.|What do {topic} and {other} have in common?
Write a quiz question about {topic} with four possible answers.
Tell a joke that mentions {topic} and {other}.|Is it easier to teach {topic} or {other} to beginners?
Draft a tweet that makes {topic} sound exciting.|What would change if nobody knew about {topic}?
Explain how {topic} relates to {other}, step by step.
""")

TASKS = _items("""
Write a polite email to {person}, who runs the {place} in {town}.
Help me plan a visit to the {place} in {town}.|I am preparing a short speech about the {place} in {town}.
Write a notice for the door of the {place} in {town}.
Make a list of questions that a journalist could ask {person} about the {place} in {town}.
Draft an agenda for a meeting with {person} at the {place} in {town}.
Write a friendly advertisement for the {place} in {town}.
{person} wants to improve the {place} in {town}; give advice.
Write a dialogue between {person} and a visitor to the {place} in {town}.
""")

DETAILS = _items("""
Mention that it opens at {hour} in the morning and that the last entry is at {late} in the afternoon.
Keep in mind that about {many} people come on a busy {day}.|Use a warm but professional tone.
The budget is {money} euros, and it cannot be exceeded this year.
Say that {other} will be the theme of the season.
Add one sentence that thanks the {few} volunteers who help every {day}.
Do not use more than {few} bullet points.|Explain why {topic} is of interest to families with children.
Finish with a clear request and a date in {month}.
Point out that parking is limited, so that visitors had better take the bus.
Include a short and memorable title.
Assume that the readers know nothing about {topic} and have little time.
Avoid technical terms wherever you can.
Ask whether the talk on {topic} could be moved from {day} to the first week of {month}.
Remind everybody that dogs are welcome in the courtyard but not inside.
Offer two alternatives and compare them.
""")

ARTICLE_TASKS = _items("""
Summarise the following article in two sentences.|Write a headline and a subtitle for this article.
Read the text below and list its three main points.
Who are the people in this text, and what does each want?
What problem does this article describe, and how was it solved?
Rewrite this report as a short letter to a friend.
List every number in the following text with what it stands for.
Is the tone of this article hopeful? Give reasons.
Write five questions that can be answered from the text below.|Explain the article below to a child.
""")

ARTICLE = """
The {place} in {town} has been a meeting point for the neighbourhood for more than {years} years.
It was founded in {year} by {person}, who had seen something similar on a journey along the coast.
At first only {few} people took part, and most of the work was done in the evenings and on {day}s.
The building itself was once a warehouse, and its thick walls still keep the rooms cool in summer.
Older residents remember that the street in front of it was not paved until the {place} became popular.
During the first winter the roof leaked so badly that buckets stood on every table.
A small grant of {money} euros paid for the repairs, and neighbours lent their tools for nothing.
Within {few} years the number of visitors had risen to about {many} a month.
Many of them come from nearby villages, since the bus from the station stops almost at the door.
On {day}s there are courses on {topic}, which are usually booked out weeks in advance.
Another group meets to talk about {other}, often until late in the evening.
"{quote}," says {second}, who has looked after the accounts since {year2}.
Not everybody was convinced from the beginning, and some shop owners feared for their trade.
A survey in {month} showed that the opposite had happened: sales in the street grew by {percent} percent.
The town council now mentions the {place} in its brochures and in its plans for the coming years.
There have been difficulties too, above all with the heating, which costs {money2} euros every winter.
Last {month2} a storm broke two windows and damaged the old sign above the entrance.
The repair took {few2} weeks, because the glass had to be cut by hand in another town.
In the meantime the courses moved to the school, where the chairs were a little too small.
Volunteers used the break to paint the hall and to sort the archive of photographs.
Among the pictures they found one of the opening day, with {person} standing in the front row.
It now hangs beside the door, and visitors like to look for their grandparents in it.
Children from the primary school have made a map that shows {few} ways to walk there safely.
Their teacher hopes that the project will make {topic} easier to understand.
For next year the members plan an exhibition on {other} and a small festival in {month}.
They are looking for sponsors, and a first company from {town2} has promised to help.
Whether the rent will stay the same is an open question, since the contract ends in {year3}.
The owner has said that she would rather keep good neighbours than earn a little more.
{second} is optimistic and has already ordered new shelves for the back room.
Anyone who would like to join can simply come by on a {day} between {hour} and noon.
""".strip().split("\n")

QUOTES = _items("""
We never planned to become this large|People stay because they are needed
A good idea is worth very little without a key|You learn more from a broken pump than from a book
The coffee is the secret of our success|Nobody here has a title, and everybody has a task
I came for one afternoon and stayed for ten years
""")

PEOPLE = _items("""
Maria Lindholm|Daniel Okafor|Ines Carvalho|Tom Hargreaves|Yuki Tanabe|Leila Farahani|Peter Novak|Grace Mbeki
Anna Kowalska|Hugo Marchetti|Sofia Andersen|Rahul Deshpande|Nora Quinn|Ivan Petrescu|Clara Weiss
Samuel Adeyemi
""")

PLACES = _items("""
repair workshop|community garden|public library|maritime museum|village bakery|music school|bicycle club
seed bank|observatory|weaving mill|children's theatre|farmers' market|swimming hall|printing studio
bird sanctuary|boat yard
""")

TOWNS = _items("""
Eastbridge|Marlow Heath|Stonehaven|Port Ellery|Ashcombe|Riverton|Oldfield|Linden Bay|Harrowgate|Westmere
Kilbrook|Fernley|Saltmarsh|Greywell|Alderton|Birchwood|Millford|Thornbury
""")

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "September", "October", "November"]


def make_prompt(rng: Random, words: int) -> str:
    """A prompt of about so many words: never fewer than its shortest kind has (about 8)."""
    facts = _facts(rng)
    if words < 25:
        return rng.choice(QUESTIONS).format(**facts)
    if words < 60:
        return _fill(rng, [rng.choice(TASKS)], DETAILS, words, facts)
    task = rng.choice(ARTICLE_TASKS)
    return task + "\n\n" + _fill(rng, [ARTICLE[0]], ARTICLE[1:], words - len(task.split()), facts)


def _fill(rng: Random, start: list[str], pool: list[str], words: int, facts: dict[str, object]) -> str:
    """`start` and, in the pool's order, as many of its sentences as come nearest to `words`."""
    count = sum(len(sentence.split()) for sentence in start)
    chosen: list[int] = []
    for i in rng.sample(range(len(pool)), len(pool)):
        length = len(pool[i].split())
        if count + length / 2 > words:
            break
        chosen.append(i)
        count += length
    return " ".join([*start, *(pool[i] for i in sorted(chosen))]).format(**facts)


def _facts(rng: Random) -> dict[str, object]:
    """One value for each blank; the same throughout a prompt, so that its sentences agree."""
    topic, other = rng.sample(TOPICS, 2)
    person, second = rng.sample(PEOPLE, 2)
    town, town2 = rng.sample(TOWNS, 2)
    year = rng.randrange(1921, 1996)
    return {
        "topic": topic, "other": other, "person": person, "second": second, "town": town, "town2": town2,
        "place": rng.choice(PLACES), "quote": rng.choice(QUOTES), "day": rng.choice(DAYS),
        "month": rng.choice(MONTHS), "month2": rng.choice(MONTHS), "hour": rng.randrange(8, 11),
        "late": rng.randrange(3, 7), "few": rng.randrange(3, 10), "few2": rng.randrange(3, 10),
        "many": 10 * rng.randrange(12, 90), "money": 100 * rng.randrange(15, 95),
        "money2": 100 * rng.randrange(15, 95), "percent": rng.randrange(4, 20), "year": year,
        "years": 2026 - year - 1, "year2": rng.randrange(1998, 2020), "year3": rng.randrange(2027, 2032),
    }  # fmt: skip
