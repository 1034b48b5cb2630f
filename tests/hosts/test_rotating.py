"""`azu up --rotate` shuts out a machine that keeps everything it had; jobs wait meanwhile."""

import time
from pathlib import Path

import pytest

from azu.errors import AzuError, Unauthenticated
from azu.launch.membership import EnrolledMembership, EnrolmentTicket, TlsFiles, decode_ticket
from azu.launch.processes import ProcessGroup
from tests.hosts.namespaces import lan
from tests.hosts.network import eventually, hosted
from tests.hosts.test_joining import REFUSED_FOR_S, Attempt, try_to_join

pytestmark = [pytest.mark.prove, pytest.mark.usefixtures("namespaces")]

MODEL = "azu/tiny-dense"


def test_a_rotation_shuts_a_dishonest_node_out_and_jobs_wait(folder: Path) -> None:
    with lan(3) as net:
        head, dishonest, honest = net.hosts
        with hosted(head, folder) as network:
            client = network.paying_client()
            opened = decode_ticket(network.ticket(dishonest))
            assert isinstance(opened, EnrolmentTicket)
            unused = network.ticket(dishonest)
            membership = EnrolledMembership(opened, folder / "bad", name="bad", host=dishonest.ip)
            access = membership.access()
            assert access.tls is not None
            before = network.facts
            address = client.balance().address
            job_id = client.submit("Hello", model=MODEL, address=address, est_tokens=4)

        with hosted(head, folder, "--rotate") as network:
            assert network.facts["network_id"] != before["network_id"]
            assert network.ray_token() != access.token
            # Its ticket and certificate open nothing, and the new token alone does not either.
            for ticket in (opened, opened.model_copy(update={"network": network.facts["network_id"]})):
                again = EnrolledMembership(ticket, folder / "bad", name="bad", host=dishonest.ip)
                with pytest.raises(Unauthenticated):
                    again.access()
            stale = decode_ticket(unused)
            assert isinstance(stale, EnrolmentTicket)
            stale = stale.model_copy(update={"network": network.facts["network_id"]})
            with pytest.raises(AzuError):
                EnrolledMembership(stale, folder / "new", name="new", host=dishonest.ip).access()
            look = decode_ticket(network.ticket(net.ip))
            assert isinstance(look, EnrolmentTicket)
            ray_head = EnrolledMembership(look, folder / "look", name="look", host=net.ip).access().head
            with ProcessGroup(folder / "logs") as nodes:
                old = TlsFiles.of(folder / "bad")
                try_to_join(nodes, dishonest, folder, ray_head, Attempt("old-cert", old, network.ray_token()))
                time.sleep(REFUSED_FOR_S)
                assert network.names() == set()
            # The job of before waited in the store, and is done by an honest node.
            user = network.logged_in()
            waits = user.results(job_id)
            assert waits.status == "queued", waits
            network.join(honest, "good", network.ticket(honest), "16MiB")
            eventually(lambda: user.results(job_id).status == "done")
            assert network.names() == {"good"}
    print(f"\nnot let in after the rotation for {REFUSED_FOR_S:.0f} s; the job of before is done")
