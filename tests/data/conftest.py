"""Worker processes of all tests here come from one server that has imported what they need."""

import multiprocessing

multiprocessing.set_forkserver_preload(["nepa_scale.data"])
