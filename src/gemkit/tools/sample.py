"""The text on which `gemkit quantize` measures the damage where the user gives none: about 1,500 tokens of many kinds.

A model's perplexity on it means little; its rise is the cost of quantisation. Dialogue, code, tables and other
languages are included because they degrade before English prose does.
"""

TEXT = """\
The lighthouse keeper's log

The lamp had been electric for thirty years, but the keeper still climbed the stairs at dusk. There were a hundred \
and twelve of them, worn hollow in the middle, and he knew without counting when he had reached the ninetieth, \
because the wall there was always damp. From the gallery he could see the whole of the bay: the fish market, the two \
churches, the railway that followed the coast as far as the tunnel, and beyond the breakwater the long grey swell \
that came in from the west. On clear evenings he wrote down the ships. On foggy ones he wrote down what he heard, \
which was usually more interesting.

In the winter of that year the bell buoy came loose from its chain and drifted for nine days. Boats that had steered \
by it since before the war went wide of the channel, and one of them, a trawler with a crew of six, ran onto the \
sandbank and had to wait there for the next high tide. Nobody was hurt. The skipper said afterwards that he had \
heard the bell on the wrong side of him and had believed his ears rather than his compass. "That," wrote the keeper, \
"is how most of us get lost."

A conversation

"Did you read the report?" Mina asked. She had put two cups of coffee on the table without saying whose they were.

"Most of it. The part about costs I read twice."

"And?"

"And I think they have counted the same warehouse three times: once as rent, once as storage, and once under \
'miscellaneous'. If you take that out, the plan nearly pays for itself by the end of the second year."

She laughed. "Nearly. My father used to say that a bridge which nearly reaches the other side is called a pier."

"Then we need another few metres of bridge. Could we start with the smaller office, and keep the lorries until \
spring?"

"We could," she said slowly. "I would have to tell the bank by Friday, though, and you would have to tell Omar."

How a refrigerator works

Heat flows by itself from warm things to cold ones, never the other way. To cool the inside of a box, a refrigerator \
therefore has to do work. A liquid with a low boiling point is let through a narrow valve into the pipes behind the \
inner wall. There the pressure is low, so the liquid evaporates, and takes the heat it needs from the air and the \
food around it. A compressor sucks the vapour away and squeezes it; this raises its temperature above that of the \
kitchen, so that it can give its heat to the room through the black grid at the back, becoming liquid again. The \
cycle then repeats. An ordinary household appliance moves about three times as much heat as the energy that its \
motor uses.

import heapq
from collections import defaultdict


def shortest_path(roads, start, goal):
    \"\"\"Return (distance, list of towns) between two towns, or None if they are not connected.\"\"\"
    neighbours = defaultdict(list)
    for a, b, length in roads:
        neighbours[a].append((length, b))
        neighbours[b].append((length, a))
    queue = [(0, start, [start])]
    seen = set()
    while queue:
        distance, town, path = heapq.heappop(queue)
        if town == goal:
            return distance, path
        if town in seen:
            continue
        seen.add(town)
        for length, other in neighbours[town]:
            if other not in seen:
                heapq.heappush(queue, (distance + length, other, path + [other]))
    return None


if __name__ == "__main__":
    roads = [("Aston", "Birch", 7), ("Birch", "Cole", 4), ("Aston", "Cole", 13), ("Cole", "Dunmore", 2)]
    print(shortest_path(roads, "Aston", "Dunmore"))  # (13, ['Aston', 'Birch', 'Cole', 'Dunmore'])

| month    | rain (mm) | sunshine (h) | warmest day (°C) |
|----------|-----------|--------------|------------------|
| January  | 83        | 41           | 9.5              |
| April    | 46        | 158          | 19.0             |
| July     | 52        | 214          | 31.5             |
| October  | 77        | 97           | 20.5             |

It rains most in January and least in April; in July there are five times as many hours of sunshine as in January.

Exercise. A train leaves at 9:40 and travels 126 km at an average speed of 84 km/h. When does it arrive? The journey \
takes 126 / 84 = 1.5 hours, that is, one hour and thirty minutes. The train therefore arrives at 11:10.

Le marché du samedi

Chaque samedi matin, la place devant la mairie se remplit de monde. Les maraîchers arrivent avant six heures, \
déchargent leurs cageots et boivent un café debout, derrière leur camion. Vers neuf heures, il devient difficile de \
traverser : on s'arrête pour goûter un fromage, pour demander des nouvelles d'une voisine, ou simplement parce que \
quelqu'un d'autre s'est arrêté. À midi, il ne reste que des feuilles de salade et quelques pigeons.

Die Wanderung

Am Morgen lag noch Nebel im Tal, aber oberhalb der Baumgrenze schien schon die Sonne. Wir folgten dem Weg, der in \
langen Kehren zur Hütte hinaufführt, und machten an der Quelle eine kurze Pause. Meine Schwester behauptete, sie \
habe auf dem Grat gegenüber drei Gämsen gesehen; ich sah nur Steine. Erst als wir weitergingen, bewegte sich einer \
der Steine und sprang mit zwei Sätzen davon.

雨の日の図書館

雨の日には、駅の近くの図書館がいつもより静かになる。窓ぎわの席に座って本を開くと、屋根を打つ雨の音だけが聞こえる。\
昨日は古い地図の本を借りた。百年前、この町には橋が一つしかなく、川の向こうはほとんど田んぼだったそうだ。

A recipe for bread without kneading

Mix 500 g of flour, 10 g of salt and 2 g of dry yeast in a large bowl. Add 375 ml of cold water and stir until no \
dry flour is left. Cover the bowl and leave it on the table overnight, for twelve to eighteen hours. In the morning, \
fold the dough twice, shape it into a ball and let it rest for another hour. Heat the oven with an empty iron pot in \
it to 240 °C. Put the dough into the hot pot, close the lid and bake for thirty minutes; then take the lid off and \
bake for fifteen minutes more, until the crust is dark brown. Let the loaf cool before you cut it, however hard that \
is.
"""
