"From written text to symbols: cleaners, symbol tables, phonemes with their times."
