"Detectors: does a curve still move, where will it end, is it worth going on? Pure numpy."
