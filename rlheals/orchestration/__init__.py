"""DVC's graph and the execution of its commands, without Prefect: what the flows in ``flows/`` are made of.

`pipeline` is the driver's access to DVC and runs in its main thread alone. `execute` runs one command
anywhere: it knows neither DVC nor Prefect. `schedule` decides what runs when. `slots` counts what a machine has.
"""
