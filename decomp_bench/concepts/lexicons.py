"""Word lists. A concept holds at whole words of its list, whatever their case; plural and verb endings count where they are regular."""

from __future__ import annotations

import re

from decomp_bench.concepts.base import Concept


def lexicon(name: str, words: str) -> Concept:
    """A concept that holds at these words."""
    either = "|".join(sorted(words.split(), key=len, reverse=True))
    return Concept(name, "lexicon", pattern=re.compile(rf"(?<![A-Za-z0-9])(?:{either})(?:e?s|e?d|ing)?(?![A-Za-z0-9])", re.IGNORECASE))


PYDOCS_LEXICONS = (
    lexicon("graphs", "graph node edge vertex vertices neighbor path cycle subgraph tree root weight degree adjacency"),
    lexicon("statistics", "distribution probability mean variance sample random normal median quantile likelihood estimate deviation"),
    lexicon("linear algebra", "matrix matrices vector eigenvalue eigenvector determinant orthogonal singular diagonal factorization rank"),
    lexicon("time", "time date datetime timedelta timestamp month day year hour minute second frequency timezone"),
    lexicon("files", "file path directory folder filename open read write download upload cache disk"),
    lexicon("errors", "error exception raise fail failure invalid warning warn traceback valueerror typeerror runtimeerror"),
    lexicon("plotting", "plot axis axes figure color marker legend label tick line image canvas colormap"),
    lexicon("learning", "train training model loss gradient epoch batch optimizer learning layer weights fit predict estimator"),
    lexicon("deprecation", "deprecated deprecate removed remove version future compatibility backward legacy"),
    lexicon("truth values", "true false none"),
)

STORY_LEXICONS = (
    lexicon("animals", "dog cat bird bunny rabbit bear fish duck frog mouse lion horse cow pig squirrel butterfly kitten puppy"),
    lexicon("food", "eat ate food cake apple cookie bread milk soup candy lunch dinner breakfast fruit banana ice cream sandwich hungry"),
    lexicon("family", "mom mommy dad daddy mother father sister brother grandma grandpa baby family"),
    lexicon("feelings", "happy sad angry scared afraid proud excited sorry cry cried smile laugh worried surprised"),
    lexicon("weather", "sun sunny rain rainy snow snowy wind windy cloud storm cold warm hot sky"),
    lexicon("play", "play toy ball game doll fun swing slide park hide block puzzle"),
    lexicon("water", "water sea river lake boat swim pond beach wave ocean pool bath"),
    lexicon("home", "house home room door bed kitchen window table chair garden wall"),
)

WEB_LEXICONS = (
    lexicon("sports", "game team player season coach league score goal championship tournament football basketball baseball soccer match"),
    lexicon("politics", "president government election vote senate congress party policy minister campaign republican democrat parliament"),
    lexicon("science", "research study scientist experiment theory laboratory physics chemistry biology species molecule particle"),
    lexicon("cooking", "recipe cook bake oven sauce salt pepper sugar butter flour onion garlic chicken dish meal restaurant"),
    lexicon("music", "song album band guitar singer concert piano melody lyric orchestra musician drum chorus"),
    lexicon("health", "doctor patient hospital disease treatment symptom medicine surgery drug vaccine clinical infection nurse"),
    lexicon("finance", "bank market stock investor price profit loan debt tax fund dollar economy interest revenue"),
    lexicon("law", "court judge lawyer trial law legal attorney jury crime guilty sentence plaintiff defendant"),
    lexicon("war", "army soldier military war weapon troop bomb attack battle missile enemy navy"),
    lexicon("computing", "computer software code program algorithm data server network internet website user app device"),
    lexicon("religion", "god church faith prayer bible jesus christian muslim temple priest holy religion"),
    lexicon("travel", "travel trip hotel flight airport tourist beach island passenger journey visit"),
)
