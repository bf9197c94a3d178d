"""What is read whole, and what is too little. A source beyond a limit is read in part, and a note says so."""

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "?")  # "None" may be a class

MOST_CELLS = 20_000_000  # rows x columns of a table
MOST_NUMBERS = 100_000_000  # in images, tensors and embeddings, which are kept as float32
MOST_BYTES = 400_000_000  # of text, or of a column-wise file's values as they lie in memory
LONGEST_LINE = 50_000_000  # bytes; one is read at a time
ROWS_AT_ONCE = 50_000  # at most, of what is read in part

FEWEST_ROWS = 50
FEWEST_TEST = 20
FEWEST_TIMES = 8
FEW_OF_CLASS = 40  # a quarter of them, locked, are fewer than the ten that a confirmation takes
MOST_CODES = 20  # a whole-number target with more distinct values than this is read as real
LARGEST = 3.4028234663852886e38  # models train in float32
NUMERIC = 0.9  # a text column of which this share are numbers is read as numbers
SIDE = 32  # the longer side of an image in pixels; larger ones are made smaller
