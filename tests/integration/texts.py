"""Short texts for the reference score, written for this test and under the project's licence.

ORDINARY is plain prose on everyday subjects. STRANGE is of other kinds: code, law, tables, sums, lists, lost order.
"""

ORDINARY = [
    "The town lies on a river that comes down from the hills in the north. In spring the water rises and covers the "
    "meadows, and in summer children swim near the old bridge. Most families have lived there for generations, and "
    "many of them still keep a small garden behind the house.",
    "Bread is made from flour, water, salt and yeast. The dough is kneaded until it is smooth and then left to rest in "
    "a warm place. After an hour it has doubled in size, and the baker shapes it into loaves. A hot oven gives the "
    "bread a dark crust and a soft inside.",
    "She was born in a village near the coast and moved to the capital when she was nine years old. After school she "
    "studied music for two years, but she left the university to work for a newspaper. Her first novel appeared when "
    "she was thirty and was read all over the country.",
    "Bees live in large colonies with a single queen. The workers collect nectar from flowers and carry it back to the "
    "hive, where it slowly turns into honey. In winter the bees stay close together to keep warm, and they live on the "
    "honey that they stored in the summer.",
    "The museum was built at the end of the nineteenth century by a rich merchant who had no children. He filled it "
    "with paintings that he had bought on his travels. Today it belongs to the city, and on Sundays visitors can walk "
    "through its quiet rooms without paying.",
    "Rain forms when warm air rises and cools. The water in it gathers around tiny grains of dust and becomes drops, "
    "and when the drops are heavy enough they fall. Mountains force the air upwards, so that one side of a range is "
    "often green while the other is dry.",
    "The train leaves the main station every hour and takes about forty minutes to reach the sea. On weekends it is "
    "full of people with bags and umbrellas. From the last stop it is a short walk along the harbour to the beach, "
    "where a few small restaurants serve fish.",
    "Cats were first kept by farmers because they caught the mice that ate the grain. Over time they became companions "
    "and moved into the house. A cat sleeps for most of the day and hunts in the evening, and it cleans its fur with "
    "its rough tongue.",
    "During the war the factory made engines for ships. Afterwards it was sold to a company that produced bicycles, "
    "and for many years it was the largest employer in the region. It closed in the seventies, and the building is now "
    "used by artists and a small theatre.",
    "A good night of sleep helps the body to recover and the mind to remember. Doctors advise people to go to bed at "
    "the same time each day and to keep the bedroom dark and cool. Coffee in the evening and bright screens make it "
    "harder to fall asleep.",
    "The football club was founded by workers of the local railway. It played its first matches on a field behind the "
    "church and won the national cup eleven years later. The new stadium holds thirty thousand people, and most games "
    "are sold out weeks before they begin.",
    "The moon goes around the earth in about four weeks. We see it because it reflects the light of the sun, and its "
    "shape seems to change as it moves. The same side always faces us, and nobody had seen the other one until a "
    "spacecraft took pictures of it.",
    "Tea came to Europe by ship and was at first so expensive that only the rich could drink it. When the prices fell, "
    "it became the most common drink in many countries. Some people like it strong with milk and sugar, while others "
    "prefer it weak with a slice of lemon.",
    "The island has a mild climate and a long coast with many small bays. Fishing was once the main source of income, "
    "but now most people work in hotels and shops. A ferry crosses to the mainland twice a day, and in good weather "
    "the journey takes three hours.",
    "My grandfather repaired clocks in a narrow shop near the market. He could tell what was wrong by listening, and "
    "he never hurried. When he retired he gave his tools to a young woman from the next street, who had often watched "
    "him work after school.",
    "Apples are picked in autumn, when they come off the branch with a gentle turn. They keep for months in a cool "
    "cellar if they do not touch each other. The best ones are eaten fresh, and the rest are made into juice, jam or "
    "cake.",
]

STRANGE = [
    "def merge(left, right):\n    out, i, j = [], 0, 0\n    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n            out.append(left[i]); i += 1\n        else:\n"
    "            out.append(right[j]); j += 1\n    return out + left[i:] + right[j:]\n",
    "SELECT c.id, c.name, SUM(o.total) AS spent FROM customers c LEFT JOIN orders o ON o.customer_id = c.id WHERE "
    "o.created_at >= '2021-01-01' GROUP BY c.id, c.name HAVING SUM(o.total) > 100 ORDER BY spent DESC LIMIT 20;",
    "1. Notwithstanding paragraph 3, point (b), the provider shall, pursuant to Article 17(2), ensure that the "
    "documentation referred to in Annex IV, Section 2, is kept at the disposal of the competent authorities, without "
    "prejudice to the obligations laid down in Articles 8, 9 and 21 of this Regulation.",
    "year;region;units;price\n2018;north;1204;3.50\n2018;south;998;3.45\n2019;north;1310;3.70\n2019;south;1077;3.60\n"
    "2020;north;870;3.95\n2020;south;655;3.90\n2021;north;1022;4.10\n",
    "3x + 7 = 22, so 3x = 22 - 7 = 15 and x = 15 / 3 = 5. Then y = 2 * 5 - 4 = 6, z = 5 * 6 = 30, and "
    "x + y + z = 5 + 6 + 30 = 41. Check: 3 * 5 + 7 = 15 + 7 = 22. 41 - 30 = 11 = 5 + 6.",
    "water the down river bridge lies a comes and that hills on near covers town rises old still the meadows the swim "
    "garden families summer in children behind house keep spring small of many the generations the have for lived "
    "there most north and from in",
    "red red red blue red red red blue red red red blue red red red blue red red red blue red red red blue red red red "
    "blue red red red blue red red red blue red red red blue red red red blue",
    '{"id": 4711, "tags": ["a", "b", "c"], "size": {"w": 640, "h": 480}, "ok": true, "next": null, "items": [{"k": 1, '
    '"v": 0.25}, {"k": 2, "v": 0.5}, {"k": 3, "v": 0.75}], "hash": "9f86d081884c7d65"}',
]
