//! Against a real bus, with a stand-in for logind and systemd on it: what is tested is what goes over the bus.

use std::{io::PipeReader, os::fd::OwnedFd as Owned, process::Child};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use parking_lot::Mutex;
use tokio::time::Instant;
use zbus::fdo;

use super::{
    super::{State, plan::Graces, sequence::Times},
    *,
};

/// A bus of our own; it ends with this.
struct Bus {
    daemon: Child,
    directory: tempfile::TempDir,
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

impl Bus {
    async fn start() -> Bus {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("--address=unix:path={}", directory.path().join("bus").display());
        let daemon = std::process::Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", &address])
            .spawn()
            .unwrap_or_else(|e| panic!("dbus-daemon: {e}: `make test` installs it"));
        let bus = Bus { daemon, directory };
        until("the bus is there", || bus.directory.path().join("bus").exists()).await;
        bus
    }

    fn address(&self) -> String {
        format!("unix:path={}", self.directory.path().join("bus").display())
    }

    fn conf(&self) -> std::path::PathBuf {
        self.directory.path().join("logind.conf.d")
    }

    async fn connect(&self) -> Connection {
        zbus::connection::Builder::address(self.address().as_str()).build().await.unwrap()
    }

    fn handle(&self, seconds: u64) -> Arc<Handle> {
        let graces = Graces::new(Duration::from_secs(seconds), Duration::ZERO).unwrap();
        let times = Times { settle: Duration::from_secs(3), proxies: Duration::from_millis(500) };
        Handle::new(Config { graces, times, bus: Some(self.address()), logind_conf_dir: self.conf() })
    }
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// What the stand-in knows.
#[derive(Clone, Default)]
struct World {
    locks: Arc<Mutex<Vec<(String, PipeReader)>>>,
    delay: Arc<Mutex<u64>>,
    preparing: Arc<Mutex<bool>>,
}

impl World {
    /// Those who hold a shutdown back: a lock is a pipe whose other end is open.
    fn held_by(&self) -> Vec<String> {
        let held = |reader: &PipeReader| {
            fcntl(reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
            io::Read::read(&mut &*reader, &mut [0]).is_err()
        };
        self.locks.lock().iter().filter(|(_, reader)| held(reader)).map(|(who, _)| who.clone()).collect()
    }
}

struct Login(World);

#[zbus::interface(name = "org.freedesktop.login1.Manager")]
impl Login {
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> fdo::Result<OwnedFd> {
        assert!(!why.is_empty());
        let (reader, writer) = io::pipe().map_err(|e| fdo::Error::Failed(e.to_string()))?;
        self.0.locks.lock().push((format!("{what} {who} {mode}"), reader));
        Ok(Owned::from(writer).into())
    }

    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn delay(&self) -> u64 {
        *self.0.delay.lock()
    }

    #[zbus(property)]
    fn preparing_for_shutdown(&self) -> bool {
        *self.0.preparing.lock()
    }
}

/// systemd, which hands logind a SIGHUP; logind reads what stands in that directory.
struct System(World, std::path::PathBuf);

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl System {
    fn kill_unit(&self, name: &str, whom: &str, signal: i32) {
        assert_eq!((name, whom, signal), ("systemd-logind.service", "all", 1));
        let text = std::fs::read_to_string(self.1.join(FILE)).unwrap();
        let seconds = text.lines().find_map(|line| line.strip_prefix("InhibitDelayMaxSec=")).unwrap();
        *self.0.delay.lock() = seconds.parse::<u64>().unwrap() * 1_000_000;
    }
}

async fn stand_in(bus: &Bus, world: &World) -> Connection {
    zbus::connection::Builder::address(bus.address().as_str())
        .serve_at(LOGIND.1, Login(world.clone()))
        .serve_at(SYSTEMD.1, System(world.clone(), bus.conf()))
        .name(LOGIND.0)
        .name(SYSTEMD.0)
        .build()
        .await
        .unwrap()
}

async fn prepare(logind: &Connection, world: &World, down: bool) {
    *world.preparing.lock() = down;
    logind.emit_signal(None::<&str>, LOGIND.1, LOGIND.2, "PrepareForShutdown", &down).await.unwrap();
}

/// What the agent does when the last pod has left.
fn over(handle: &Handle) {
    handle.state.send_modify(|state| *state = State { down: true, over: true, ..State::default() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_is_held_back_until_the_pods_have_left() {
    let (bus, world) = (Bus::start().await, World::default());
    *world.delay.lock() = 5_000_000;
    let logind = stand_in(&bus, &world).await;
    let (handle, stop) = (bus.handle(30), CancellationToken::new());
    let running = tokio::spawn(run(handle.clone(), stop.clone()));
    until("it is held back", || world.held_by() == ["shutdown seawall delay"]).await;
    assert_eq!(*world.delay.lock(), 37_000_000, "30 s for pods, twice 3 s and 0.5 s for endpoints and last words");
    assert_eq!(is_going_down(handle.config()).await, Some(false));

    prepare(&logind, &world, true).await;
    until("pods leave", || handle.is_down()).await;
    assert_eq!(world.held_by().len(), 1, "they are not gone yet");
    assert_eq!(is_going_down(handle.config()).await, Some(true));
    over(&handle);
    until("the machine may go down", || world.held_by().is_empty()).await;

    // Somebody has called it off.
    prepare(&logind, &world, false).await;
    until("it is held back again", || world.held_by().len() == 1).await;
    assert!(!handle.is_down());

    // logind is started again, and knows of no lock.
    drop(logind);
    world.locks.lock().clear();
    let logind = stand_in(&bus, &world).await;
    until("the new one is told too", || world.held_by().len() == 1).await;
    prepare(&logind, &world, true).await;
    until("pods leave", || handle.is_down()).await;
    over(&handle);
    until("the machine may go down", || world.held_by().is_empty()).await;
    stop.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_of_use_even_if_it_holds_for_less() {
    let (bus, world) = (Bus::start().await, World::default());
    *world.delay.lock() = 5_000_000;
    let logind = stand_in(&bus, &world).await;
    // Nothing can be written there.
    std::fs::write(bus.conf(), "").unwrap();
    let (handle, stop) = (bus.handle(30), CancellationToken::new());
    let connection = bus.connect().await;
    let manager = proxy(&connection, LOGIND).await.unwrap();
    let error = allow(&connection, &manager, handle.config()).await.unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}/{FILE}: ", bus.conf().display())), "{error}");
    let running = tokio::spawn(run(handle.clone(), stop.clone()));
    until("it is held back", || world.held_by().len() == 1).await;
    stop.cancel();
    running.await.unwrap().unwrap();
    until("who ends holds nothing", || world.held_by().is_empty()).await;
    drop(logind);
}

#[tokio::test(start_paused = true)]
async fn without_a_bus_everything_goes_on() {
    let graces = Graces::new(Duration::from_secs(30), Duration::ZERO).unwrap();
    let bus = Some("unix:path=/nowhere/bus".to_owned());
    let handle = Handle::new(Config { graces, bus, ..Config::default() });
    assert_eq!(is_going_down(handle.config()).await, None);
    let stop = CancellationToken::new();
    let running = tokio::spawn(run(handle.clone(), stop.clone()));
    sleep(LATER * 3).await;
    assert!(!running.is_finished() && !handle.is_down());
    stop.cancel();
    running.await.unwrap().unwrap();
}
