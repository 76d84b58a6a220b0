"""Eight workers of a study on SLURM by dask-jobqueue: `python docs/cluster/jobqueue.py`, and leave it open."""

from dask_jobqueue import SLURMCluster

cluster = SLURMCluster(cores=1, processes=1, memory="4GB", walltime="04:00:00")
cluster.scale(8)
input(f"In another terminal: tune --study night --trials 200 --workers 8 --dask {cluster.scheduler_address} ")
