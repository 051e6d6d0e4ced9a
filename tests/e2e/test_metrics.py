"""Every process serves its metrics on loopback, and a call is counted where it was served."""

import httpx

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import LIST_JOBS, User

SERVING = {"gateway", "credits", "jobs", "relay", "inference-0", "dispatch-0"}


async def test_every_process_serves_metrics(alice: User) -> None:
    await alice.call(LIST_JOBS, jobs_pb2.ListJobsRequest())
    pages: dict[str, str] = {}
    async with httpx.AsyncClient() as http:
        for process in alice.edge.stack.processes:
            if process.metrics_address:
                assert process.metrics_address.startswith("127.0.0.1:")
                reply = await http.get(f"http://{process.metrics_address}/metrics")
                assert reply.status_code == 200
                pages[process.name] = reply.text
    assert pages.keys() == SERVING
    counted = 'genmesh_rpc_duration_seconds_count{code="OK",method="/genmesh.jobs.v1.JobsService/ListJobs"}'
    assert counted in pages["jobs"]
    assert counted not in pages["gateway"]
