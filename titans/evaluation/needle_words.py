"""Words for the keys of the needle tasks: any adjective and any noun make a key ("brisk-lantern").

A list of our own. RULER takes its words from the wonderwords package, so its keys are other words of the
same form.
"""

_ADJECTIVES = """
able absent active agile amber ample ancient arid atomic aware azure balanced bare bitter blank bleak blond
blunt bold bouncy brave brief bright brisk broad broken bronze bumpy busy calm candid careful casual central
certain charming cheap cheerful chilly civil classic clean clear clever cloudy clumsy coarse cold colossal
common complex cool copper coral cosmic cosy crisp crooked cruel curious curly cyan daily damp daring dark
dear deep dense dim distant dizzy double dreamy dry dual dull dusty eager early earnest eastern easy elastic
elder electric elegant empty endless equal exact exotic extra faint fair faithful famous fancy fast fatal
feeble festive few fierce final fine firm fluffy fluid fond foreign formal fragile frank free fresh friendly
frosty frozen full funny fuzzy gentle giant gifted glad glassy global gloomy glossy golden good graceful
grand grateful gray great green grim handy happy hard harsh hasty hazy heavy helpful hidden hollow honest
humble hungry icy ideal idle immense infinite inner ivory jolly joyful keen kind large late lavish lazy lean
legal light likely linear little lively local lofty lone long loose loud lovely loyal lucky lunar magenta
main major marble marine mature meek mellow merry mighty mild minor misty mobile modern modest moist muddy
mute narrow native neat nervous nimble noble noisy normal northern novel oaken odd olive open opposite
orange outer oval pale patient peaceful perfect plain playful polite polished portable precise pretty prime
private proud public pure purple quaint quick quiet radiant random rapid rare raw ready real regal remote
rich rigid ripe robust rosy rough round royal rugged rural rusty sacred safe salty sandy scarce scarlet
secret serene shady shallow sharp shiny short shy silent silky silver simple sleepy slender slim slow smart
smooth snowy social soft solar solid sour southern spare speedy spicy spiral square stable stale steady
steep sticky stiff still strange strict strong sturdy subtle sudden sunny swift tall tame tangy tart teal
tender thick thin tidy tiny tired tough tranquil tropical trusty urban useful vague vast velvet verbal vivid
warm wary weary western wet white wide wild windy wise witty wooden woolly worthy yellow young zealous
"""

_NOUNS = """
acorn actor airport album alley almond anchor ankle antenna apple apron arch arena armor arrow artist atlas
attic author autumn avenue award axle badge bakery balcony ballad balloon bamboo banana banner barn barrel
basin basket battery beach beacon beaver bell bench berry bicycle bird biscuit blanket blossom boat book
boot border bottle boulder bowl bracelet branch bread breeze brick bridge broom brush bucket buckle building
butter button cabin cable cactus camera camp canal candle canoe canvas canyon captain caravan cargo carpet
carrot castle cave cedar cellar chain chair chalk chapel cherry chest chimney circle circus citizen clarinet
clay cliff clock cloud clover coach coast coat cobbler coin collar comet compass concert copy corner cottage
cotton court cradle crane crayon creek cricket crown crystal cup curtain cushion dancer desert desk dial
diamond dinner doctor dolphin donkey door dragon drawer dress drum eagle easel echo eclipse elbow elephant
engine envelope falcon farmer feather fence fern festival fiddle field finch finger fire flag flame flask
flute foam fog forest fork fountain fox frame galaxy gallery garage garden garlic gate geyser ginger giraffe
glacier glass globe glove goat grain granite grape grass guitar hammer hammock harbor harp hat hawk hazel
hedge helmet heron hill hinge honey horizon horn horse hotel house iceberg igloo ink island jacket jar jewel
journal jungle kayak kettle key kitchen kite kitten knot ladder lagoon lake lamp lantern lemon lens letter
library lily lion lizard locket lumber lute magnet mango mantle map maple market mask meadow medal melody
melon meteor mill mirror mitten monument moon mosaic motor mountain mouse museum mushroom napkin necklace
needle nest nickel notebook novel oak oar oasis ocean onion opera orbit orchard orchid otter oven owl oyster
paddle palace palm panda panel paper parade parcel park parrot path peach peanut pearl pebble pelican pencil
penguin pepper piano picture pigeon pillow pilot pine pirate planet plaza plum pocket poem pond poppy porch
potato prairie prism puddle pumpkin puppet puzzle pyramid quarry quartz quilt rabbit raccoon radio raft
railway rain ranch raven reef ribbon ridge ring river road robin rocket roof rope rose ruby saddle sail
salmon sandal satchel saucer scarf school scooter seal season shadow shell shelter ship shoe shore shovel
shrine signal skate sketch sled slipper snail sofa song spark sparrow spider spoon spring squirrel stadium
stage stair statue stone storm stove street sugar summit swan table tailor teapot temple tent theater
thimble thistle ticket tiger timber toast tomato torch tower train tree trumpet tulip tunnel turtle umbrella
valley vase village vine violin volcano wagon wallet walnut walrus water wave whale wheel whistle willow
window winter wizard wolf yard zebra
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
