"Settings and the small contracts everything else speaks in: hyper-parameters, tuner settings, decisions, errors."
