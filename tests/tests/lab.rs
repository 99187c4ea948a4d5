//! The lab: machines that boot, lose their power, hang, are cut off and come back; and nothing of it stays behind.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use seawall_drill::lab::{HOST, Lab, Machine, Options, Power, Program, Service, Way};
use seawall_tests::{seawall, until, within};
use tempfile::TempDir;
use tokio::{process::Child, time::Instant};

/// How long something that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(700);

/// A bare lab in a directory of its own; taken away with everything when the test ends, however it does.
struct Bare {
    lab: Lab,
    dir: Arc<TempDir>,
}

fn directory() -> Arc<TempDir> {
    assert!(nix::unistd::geteuid().is_root(), "this test makes machines: run it as root");
    Arc::new(tempfile::Builder::new().prefix("seawall-lab-test-").tempdir_in("/var/lib").unwrap())
}

fn options(name: &str, dir: &Path, servers: u8, agents: u8) -> Options {
    Options {
        name: name.into(),
        dir: dir.join("labs"),
        servers,
        agents,
        subnet: None,
        networks: 1,
        dual_stack: false,
        cpus: None,
        binary: seawall(),
        cluster: None,
    }
}

impl Bare {
    async fn up(name: &str, servers: u8, agents: u8) -> Bare {
        Bare::up_in(directory(), name, servers, agents).await
    }

    async fn up_in(dir: Arc<TempDir>, name: &str, servers: u8, agents: u8) -> Bare {
        let started = Instant::now();
        let lab = Lab::up(options(name, dir.path(), servers, agents), Arc::new(|_: &str| {})).await.unwrap();
        eprintln!("lab {name}: {} machines in {:?}", lab.machines().len(), started.elapsed());
        Bare { lab, dir }
    }

    fn machine(&self, name: &str) -> Machine {
        self.lab.machine(name).unwrap()
    }

    fn labs(&self) -> PathBuf {
        self.dir.path().join("labs")
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for machine in self.lab.machines() {
                for log in [machine.console(), machine.log()] {
                    let text = fs::read_to_string(&log).unwrap_or_default();
                    let lines: Vec<&str> = text.lines().collect();
                    eprintln!("--- {}\n{}", log.display(), lines[lines.len().saturating_sub(20)..].join("\n"));
                }
            }
        }
        // The binary does it as well as the library, and needs no runtime here.
        let down = std::process::Command::new(seawall())
            .args(["lab", "down", "--name", self.lab.name(), "--dir"])
            .arg(self.labs())
            .stderr(Stdio::null())
            .status();
        assert!(down.is_ok_and(|s| s.success()) || std::thread::panicking(), "the lab is not taken away");
    }
}

/// What is left of a lab anywhere on the host.
fn left_of(name: &str, dir: &Path) -> Vec<String> {
    let prefix = format!("seawall-lab.{name}.");
    let mut left = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in mounts.lines() {
        if line.contains(&prefix) || line.contains(dir.to_str().unwrap()) {
            left.push(format!("mount {line}"));
        }
        if line.contains(" - cgroup") {
            let at = line.split(' ').nth(4).unwrap();
            left.extend(listed(Path::new(at), &prefix).map(|g| format!("cgroup {at}/{g}")));
        }
    }
    left.extend(listed(Path::new("/run/netns"), &prefix).map(|n| format!("namespace {n}")));
    left.extend(
        listed(Path::new("/sys/class/net"), &format!("swl-{name}"))
            .filter(|n| *n == format!("swl-{name}"))
            .map(|n| format!("link {n}")),
    );
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default().replace('\0', " ");
        if command.contains(&format!("{}/labs/{name}/", dir.display())) {
            left.push(format!("process {} {command}", process.file_name().display()));
        }
    }
    if dir.join("labs").join(name).exists() {
        left.push(format!("{}/labs/{name}", dir.display()));
    }
    left
}

fn listed(directory: &Path, prefix: &str) -> impl Iterator<Item = String> {
    let names =
        fs::read_dir(directory).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    names.filter(move |n| n.starts_with(prefix)).collect::<Vec<_>>().into_iter()
}

/// Runs `work` in a machine's network, or in the host's. Sockets stay in the network in which they were made.
fn on<T: Send>(machine: Option<&Machine>, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Some(machine) = machine {
                setns(File::open(machine.network()).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            }
            work()
        });
        thread.join().unwrap()
    })
}

fn connect(from: Option<&Machine>, to: &Machine) -> std::io::Result<TcpStream> {
    let address = SocketAddr::new(to.address().into(), PORT);
    let stream = on(from, || TcpStream::connect_timeout(&address, Duration::from_secs(2)))?;
    stream.set_read_timeout(Some(SILENCE))?;
    Ok(stream)
}

const PORT: u16 = 7000;

/// A process on a machine that sends back what it gets.
async fn echo(machine: &Machine) -> Child {
    let mut command = machine.command("busybox");
    command.args(["nc", "-ll", "-p", &PORT.to_string(), "-e", "cat"]).stdin(Stdio::null()).kill_on_drop(true);
    let child = command.spawn().unwrap();
    until("the echo answers", async || exchange(&mut connect(None, machine).ok()?).ok()).await;
    child
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"hello\n")?;
    let mut answer = [0; 6];
    stream.read_exact(&mut answer)?;
    assert_eq!(&answer, b"hello\n");
    Ok(())
}

/// What the next read gives: how much, or the kind of error. A timeout is `WouldBlock`.
fn heard(stream: &mut TcpStream) -> Result<usize, ErrorKind> {
    stream.read(&mut [0; 64]).map_err(|e| e.kind())
}

async fn says(machine: &Machine, script: &str) -> String {
    machine.run("sh", &["-c", script], Duration::from_secs(20)).await.unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_apart_and_reach_each_other() {
    let bare = Bare::up("apart", 2, 1).await;
    let machines = bare.lab.machines();
    let _echoes = [echo(&machines[0]).await, echo(&machines[1]).await, echo(&machines[2]).await];
    for to in &machines {
        exchange(&mut connect(None, to).unwrap()).unwrap();
        for from in &machines {
            exchange(&mut connect(Some(from), to).unwrap()).unwrap();
        }
    }
    let mut ids = Vec::new();
    for machine in &machines {
        assert_eq!(says(machine, "hostname; cat /etc/hostname").await, format!("{0}\n{0}", machine.name()));
        let names = says(machine, "getent hosts s1 s2 a1 | tr -s ' '").await;
        assert_eq!(
            names,
            format!("{} s1\n{} s2\n{} a1", machines[0].address(), machines[1].address(), machines[2].address())
        );
        // Its first process, the echo with its shell-less child, and what asks.
        let processes = says(machine, "cat /proc/[0-9]*/comm").await;
        assert!(!processes.contains("lab_test") && processes.lines().count() < 10, "{processes}");
        assert_eq!(says(machine, "cat /proc/1/cgroup | grep -v ':/$' | grep -v ':/init$' || true").await, "");
        ids.push(says(machine, "cat /etc/machine-id").await);
        ids.push(says(machine, "cat /proc/sys/kernel/random/boot_id").await);
        // Nothing of the labs, of other machines' disks, or of the host's mounts.
        assert_eq!(says(machine, &format!("ls -A {}", bare.labs().display())).await, "");
        assert_eq!(says(machine, "ls /run; ls -A /tmp").await, "lock\nseawall-lab");
        // Nobody routes from here to anywhere, and that is said at once rather than by silence.
        let refused =
            on(Some(machine), || TcpStream::connect_timeout(&"198.51.100.1:80".parse().unwrap(), SILENCE * 3));
        let kind = refused.unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable), "{kind:?}");
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 6, "every machine has an identity and a boot of its own: {ids:?}");
    // Files are a machine's own.
    says(
        &machines[0],
        "echo one >/etc/who; echo one >/var/lib/seawall/who; echo one >/var/cache/who; echo one >/var/log/who",
    )
    .await;
    let who = "cat /etc/who /var/lib/seawall/who /var/cache/who /var/log/who 2>/dev/null || true";
    assert_eq!(says(&machines[1], who).await, "");
    assert!(!Path::new("/etc/who").exists() && !Path::new("/var/cache/who").exists());
    assert_eq!(fs::read_to_string(machines[0].on_disk("/var/lib/seawall/who")).unwrap(), "one\n");
    assert_eq!(fs::read_to_string(machines[0].on_disk("/etc/who")).unwrap(), "one\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_loses_its_power_and_comes_back() {
    let bare = Bare::up("power", 2, 1).await;
    let (s1, s2) = (bare.machine("s1"), bare.machine("s2"));
    let mut s1_echo = echo(&s1).await;
    let mut stream = connect(Some(&s2), &s1).unwrap();
    exchange(&mut stream).unwrap();
    // A process that only ends says goodbye: this is how the difference would show.
    let mut other = connect(Some(&s2), &s1).unwrap();
    exchange(&mut other).unwrap();
    let served = says(&s1, "pidof cat | wc -w").await;
    assert_eq!(served, "2");
    says(&s1, "kill -9 $(pidof cat | cut -d' ' -f1)").await;
    let (first, second) = (heard(&mut stream), heard(&mut other));
    assert!(first == Ok(0) || second == Ok(0), "one was closed: {first:?} {second:?}");
    let mut stream = if first == Ok(0) { other } else { stream };
    exchange(&mut stream).unwrap();

    says(&s1, "echo kept >/var/lib/seawall/file; echo kept >/etc/file; echo gone >/run/file; echo gone >/tmp/file")
        .await;
    let (id, boot) = ("cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id");
    let before = (says(&s1, id).await, says(&s1, boot).await);
    assert!(s1.processes().unwrap().len() >= 3);
    let started = Instant::now();
    s1.power_off(false).await.unwrap();
    eprintln!("power-off: {:?}", started.elapsed());
    assert_eq!(s1.power().unwrap(), Power::Off);
    assert_eq!(s1.processes().unwrap(), [] as [i32; 0]);
    assert_eq!(left_of("power", bare.dir.path()).iter().filter(|l| l.contains(".s1")).count(), 0);
    assert_eq!(heard(&mut stream), Err(ErrorKind::WouldBlock), "neither FIN nor RST: silence");
    // What is sent now is heard by nobody either.
    stream.write_all(b"hello\n").unwrap();
    assert_eq!(heard(&mut stream), Err(ErrorKind::WouldBlock));
    assert!(s1_echo.wait().await.is_ok(), "who had entered the machine is gone as well");
    let refused = s1.run("true", &[], SILENCE).await.unwrap_err().to_string();
    assert!(refused.contains("machine s1 is not up"), "{refused}");
    s1.power_off(false).await.expect("twice is fine");

    let started = Instant::now();
    s1.power_on().await.unwrap();
    eprintln!("power-on: {:?}", started.elapsed());
    // The new boot knows nothing of the connection, and says so at the next retransmission.
    let reset = within(Duration::from_secs(20), "the old connection is reset", async || {
        heard(&mut stream).err().filter(|kind| *kind != ErrorKind::WouldBlock)
    });
    assert_eq!(reset.await, ErrorKind::ConnectionReset);
    let now = (says(&s1, id).await, says(&s1, boot).await);
    assert_eq!(now.0, before.0, "the same machine");
    assert_ne!(now.1, before.1, "another boot");
    assert_eq!(
        says(&s1, "cat /var/lib/seawall/file /etc/file; ls /run /tmp").await,
        "kept\nkept\n/run:\nlock\nseawall-lab\n\n/tmp:"
    );
    let _echo = echo(&s1).await;
    exchange(&mut connect(Some(&s2), &s1).unwrap()).unwrap();
    let said = s1.power_on().await.unwrap_err().to_string();
    assert_eq!(said, "machine s1 is on: it has power already");

    s1.power_off(true).await.unwrap();
    s1.power_on().await.unwrap();
    assert_eq!(says(&s1, "ls -A /var/lib/seawall; ls /etc/file 2>/dev/null || true").await, "", "an empty disk");
    assert_ne!(says(&s1, id).await, before.0, "a new machine");

    // An orderly reboot: programs hear of it, connections are closed.
    let mut stopping = s2.command("sh");
    stopping.args(["-c", "trap 'echo heard >/var/lib/seawall/stop; exit' TERM; touch /var/lib/seawall/waits; while :; do sleep 0.05; done"]);
    let mut stopping = stopping.stdin(Stdio::null()).kill_on_drop(true).spawn().unwrap();
    until("the program waits", async || s2.on_disk("/var/lib/seawall/waits").exists().then_some(())).await;
    s2.reboot().await.unwrap();
    assert!(stopping.wait().await.is_ok());
    assert_eq!(says(&s2, "cat /var/lib/seawall/stop").await, "heard");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_hangs_and_goes_on() {
    let bare = Bare::up("hang", 1, 1).await;
    let (s1, a1) = (bare.machine("s1"), bare.machine("a1"));
    let _echo = echo(&s1).await;
    let mut stream = connect(Some(&a1), &s1).unwrap();
    exchange(&mut stream).unwrap();
    s1.freeze().await.unwrap();
    assert_eq!(s1.power().unwrap(), Power::Frozen);
    // Its network card still answers, so a connection is made; nobody is at home.
    let mut late = connect(Some(&a1), &s1).unwrap();
    for stream in [&mut stream, &mut late] {
        stream.write_all(b"hello\n").unwrap();
        assert_eq!(heard(stream), Err(ErrorKind::WouldBlock));
    }
    s1.thaw().await.unwrap();
    assert_eq!(s1.power().unwrap(), Power::On);
    for stream in [&mut stream, &mut late] {
        assert_eq!(within(Duration::from_secs(10), "an answer", async || heard(stream).ok()).await, 6);
    }
    // A frozen machine can lose its power, and comes back running.
    s1.freeze().await.unwrap();
    s1.power_off(false).await.unwrap();
    let said = s1.thaw().await.unwrap_err().to_string();
    assert_eq!(said, "machine s1 is off: there is nothing to thaw");
    s1.power_on().await.unwrap();
    assert_eq!(s1.power().unwrap(), Power::On);
    let _echo = echo(&s1).await;
}

/// Which datagrams arrive, among machines and the host, in pairs `from>to`.
fn passes(lab: &Lab) -> Vec<String> {
    let machines = lab.machines();
    let everyone: Vec<Option<&Machine>> = machines.iter().map(Some).chain([None]).collect();
    let name = |m: Option<&Machine>| m.map_or(HOST, Machine::name).to_owned();
    let address = |m: Option<&Machine>| -> IpAddr { m.map_or(lab.subnet().host(), Machine::address).into() };
    let sockets: Vec<UdpSocket> =
        everyone.iter().map(|m| on(*m, || UdpSocket::bind((address(*m), PORT)).unwrap())).collect();
    for (from, socket) in everyone.iter().zip(&sockets) {
        for to in everyone.iter().filter(|to| name(**to) != name(*from)) {
            // Twice: the first may wait for the neighbour's address.
            for _ in 0..2 {
                let _ = socket.send_to(name(*from).as_bytes(), (address(*to), PORT));
            }
        }
    }
    let mut seen = Vec::new();
    for (to, socket) in everyone.iter().zip(&sockets) {
        socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut buffer = [0; 16];
        while let Ok((length, _)) = socket.recv_from(&mut buffer) {
            seen.push(format!("{}>{}", String::from_utf8_lossy(&buffer[..length]), name(*to)));
        }
    }
    seen.sort();
    seen.dedup();
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_cut_off_and_mended() {
    let bare = Bare::up("cut", 2, 1).await;
    let lab = &bare.lab;
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let all = passes(lab);
    assert_eq!(all.len(), 12, "{all:?}");
    let check = async |when: &str, missing: &[&str]| {
        let now = passes(lab);
        let gone: Vec<&str> = all.iter().filter(|p| !now.contains(p)).map(String::as_str).collect();
        assert_eq!(gone, missing, "{when}");
        let cuts: Vec<String> = lab.status().await.unwrap().cuts.iter().map(|(a, b)| format!("{a}>{b}")).collect();
        assert_eq!(cuts, missing, "{when}: the status says the same");
    };
    lab.partition(&names(&["s1"]), &names(&["s2"]), Way::Both).await.unwrap();
    check("both ways", &["s1>s2", "s2>s1"]).await;
    lab.partition(&names(&["a1"]), &names(&["s2"]), Way::In).await.unwrap();
    check("one more, into a1", &["s1>s2", "s2>a1", "s2>s1"]).await;
    lab.heal(&names(&["s1"])).await.unwrap();
    check("s1 is mended", &["s2>a1"]).await;
    // A cut is the cable's, not the boot's.
    let a1 = bare.machine("a1");
    a1.power_off(false).await.unwrap();
    a1.power_on().await.unwrap();
    check("after a reboot", &["s2>a1"]).await;
    lab.heal(&[]).await.unwrap();
    check("all is mended", &[]).await;
    lab.partition(&names(&["s1"]), &[], Way::Out).await.unwrap();
    check("s1 is not heard by anyone", &["s1>a1", "s1>host", "s1>s2"]).await;
    lab.heal(&[]).await.unwrap();
    lab.partition(&names(&["s1", "a1"]), &[], Way::Both).await.unwrap();
    check("two, together", &["a1>host", "a1>s2", "host>a1", "host>s1", "s1>host", "s1>s2", "s2>a1", "s2>s1"]).await;
    lab.heal(&[]).await.unwrap();

    lab.loss(100.0).await.unwrap();
    assert_eq!(passes(lab), [] as [&str; 0]);
    lab.loss(30.0).await.unwrap();
    assert_eq!(lab.status().await.unwrap().loss, 30.0);
    let (s1, s2) = (bare.machine("s1"), bare.machine("s2"));
    let sender = on(Some(&s1), || UdpSocket::bind((s1.address(), 0)).unwrap());
    let receiver = on(Some(&s2), || UdpSocket::bind((s2.address(), PORT)).unwrap());
    receiver.set_read_timeout(Some(SILENCE)).unwrap();
    let mut arrived = 0;
    for _ in 0..1000 {
        sender.send_to(b"x", (s2.address(), PORT)).unwrap();
        receiver.set_nonblocking(true).unwrap();
        arrived += usize::from(receiver.recv(&mut [0; 8]).is_ok());
    }
    receiver.set_nonblocking(false).unwrap();
    while receiver.recv(&mut [0; 8]).is_ok() {
        arrived += 1;
    }
    assert!((500..900).contains(&arrived), "{arrived} of 1000 arrived at 30 % loss");
    drop((sender, receiver));
    lab.heal(&[]).await.unwrap();
    check("loss is mended as well", &[]).await;
    let said = lab.partition(&names(&["s1"]), &names(&["s9"]), Way::Both).await.unwrap_err().to_string();
    assert_eq!(said, "lab cut has no machine \"s9\" (it has s1, s2, a1)");
    assert!(lab.loss(101.0).await.unwrap_err().to_string().contains("from 0 to 100"));
}

#[tokio::test(flavor = "multi_thread")]
async fn labs_side_by_side() {
    let dir = directory();
    let (one, two) = tokio::join!(Bare::up_in(dir.clone(), "one", 2, 0), Bare::up_in(dir.clone(), "two", 2, 0));
    assert_ne!(one.lab.subnet(), two.lab.subnet());
    assert_eq!(Lab::names(&one.labs()), ["one", "two"]);
    let again = Lab::up(options("one", dir.path(), 1, 0), Arc::new(|_: &str| {})).await.unwrap_err().to_string();
    assert!(again.contains("lab one is up already") && again.contains("seawall lab down --name one"), "{again}");
    let _echoes = [echo(&one.machine("s1")).await, echo(&two.machine("s1")).await];
    exchange(&mut connect(Some(&two.machine("s2")), &two.machine("s1")).unwrap()).unwrap();
    let across = connect(Some(&one.machine("s2")), &two.machine("s1"));
    assert!(across.is_err(), "one lab's machines do not reach the other's");
    one.machine("s1").power_off(false).await.unwrap();
    assert!(Lab::down("one", &one.labs()).await.unwrap());
    assert_eq!(left_of("one", dir.path()), [] as [&str; 0]);
    assert!(!Lab::down("one", &one.labs()).await.unwrap(), "there is nothing any more, and that is fine");
    exchange(&mut connect(Some(&two.machine("s2")), &two.machine("s1")).unwrap()).unwrap();
    assert!(Lab::down("two", &one.labs()).await.unwrap());
    until("nothing of it is left", async || left_of("two", dir.path()).is_empty().then_some(())).await;
    assert!(!one.labs().exists(), "not even the directory of all labs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_command_leaves_is_cleared() {
    let dir = directory();
    let labs = dir.path().join("labs");
    let up = || {
        let mut command = std::process::Command::new(seawall());
        command
            .args(["lab", "up", "--bare", "--servers", "2", "--agents", "1", "--name", "killed", "--dir"])
            .arg(&labs);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    // Twice as long as it takes here, in steps: before it has begun, in the midst of everything, after its end.
    for step in 0..16 {
        let mut child = up().spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(step * 40)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        if step % 4 == 3 {
            // The next `up` clears as well, unless the killed one had come to its end.
            let again = up().stderr(Stdio::piped()).output().unwrap();
            let said = String::from_utf8_lossy(&again.stderr).into_owned();
            assert!(again.status.success() || said.contains("is up already"), "step {step}: {said}");
            let lab = Lab::open("killed", &labs).unwrap();
            for machine in lab.machines() {
                assert_eq!(machine.power().unwrap(), Power::On, "step {step}");
            }
        }
        Lab::down("killed", &labs).await.unwrap();
        assert_eq!(left_of("killed", dir.path()), [] as [&str; 0], "step {step}");
    }
    // Names without a state: all that a crash could leave is found by its name.
    let lab = Lab::up(options("killed", dir.path(), 1, 0), Arc::new(|_: &str| {})).await.unwrap();
    fs::remove_dir_all(labs.join("killed")).unwrap();
    let said = Lab::open("killed", &labs).unwrap_err().to_string();
    assert!(said.starts_with("lab killed was not finished"), "{said}");
    assert!(Lab::down("killed", &labs).await.unwrap());
    drop(lab);
    until("nothing is left", async || left_of("killed", dir.path()).is_empty().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_kept_running() {
    let bare = Bare::up("service", 1, 0).await;
    let s1 = bare.machine("s1");
    let said = s1.kill(Program::Seawall).await.unwrap_err().to_string();
    assert_eq!(said, "machine s1 is on: seawall does not run there");
    let args = ["server", "--disable", "agent,proxy", "--node-ip", &s1.address().to_string()].map(str::to_owned);
    s1.set_service(&Service { args: args.to_vec(), run: true, ..Service::default() }).unwrap();
    let serves = async || until("the server answers", async || port_open(&s1).then_some(())).await;
    serves().await;
    let first = s1.pid_of(Program::Seawall).unwrap().unwrap();
    assert_eq!(s1.kill(Program::Seawall).await.unwrap(), first);
    serves().await;
    let second = s1.pid_of(Program::Seawall).unwrap().unwrap();
    assert_ne!(second, first);
    assert_eq!((s1.told().running, s1.told().ended), (true, 1));
    let status = bare.lab.status().await.unwrap();
    assert_eq!(status.machines[0].programs["seawall"].pid, second);
    assert!(status.machines[0].programs["seawall"].memory > 1.0);
    s1.set_running(false).await.unwrap();
    assert_eq!(s1.pid_of(Program::Seawall).unwrap(), None);
    assert!(!port_open(&s1));
    s1.set_running(true).await.unwrap();
    serves().await;
    s1.power_off(false).await.unwrap();
    s1.power_on().await.unwrap();
    serves().await;
    assert_eq!(s1.told().ended, 0, "a new boot counts anew");
    until("the log has it", async || fs::read_to_string(s1.log()).unwrap().contains("the API is served").then_some(()))
        .await;
    s1.reboot().await.unwrap();
    serves().await;
}

fn port_open(machine: &Machine) -> bool {
    TcpStream::connect_timeout(&SocketAddr::new(machine.address().into(), 6443), Duration::from_secs(1)).is_ok()
}

fn command(labs: &Path, args: &[&str]) -> (bool, String, String) {
    let mut command = std::process::Command::new(seawall());
    command.arg("lab").args(args).env("SEAWALL_LAB_DIR", labs).stdin(Stdio::null());
    outcome(command)
}

fn outcome(mut command: std::process::Command) -> (bool, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn without_root_it_says_what_it_needs() {
    // A copy where anyone may read it.
    let dir = tempfile::Builder::new().prefix("seawall-").tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let binary = dir.path().join("seawall");
    fs::copy(seawall(), &binary).unwrap();
    for args in [&["up"][..], &["down"], &["status"], &["power-off", "s1"]] {
        let mut command = std::process::Command::new(&binary);
        command.arg("lab").args(args).uid(65534).gid(65534);
        let (success, _, stderr) = outcome(command);
        assert!(!success);
        assert_eq!(
            stderr,
            "seawall: this host cannot run a lab:\n  - root is needed: it makes namespaces, mounts and cgroups; run it with sudo\n"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line() {
    let bare = Bare::up("words", 1, 1).await;
    let labs = bare.labs();
    let fails = |args: &[&str], words: &[&str]| {
        let (success, _, stderr) = command(&labs, args);
        assert!(!success, "{args:?}");
        for word in words {
            assert!(stderr.contains(word), "{args:?}: {word:?} is not in:\n{stderr}");
        }
    };
    fails(
        &["status", "--name", "other"],
        &["there is no lab \"other\"", "labs there: words", "seawall lab up --name other"],
    );
    fails(&["power-off", "s7", "--name", "words"], &["lab words has no machine \"s7\" (it has s1, a1)"]);
    fails(&["power-on", "s1", "--name", "words"], &["machine s1 is on: it has power already"]);
    fails(&["kill", "s1", "etcd", "--name", "words"], &["machine s1 is on: etcd does not run there"]);
    fails(&["kill", "s1", "sshd", "--name", "words"], &["possible values: seawall, etcd, containerd"]);
    fails(&["up", "--name", "words", "--bare"], &["lab words is up already"]);
    fails(&["up", "--name", "Words"], &["--name \"Words\": a lab's name consists of a-z"]);
    fails(&["up", "--name", "w", "--servers", "0", "--agents", "0", "--bare"], &["a lab has a machine at least"]);
    fails(&["up", "--name", "w", "--servers", "99", "--bare"], &["--servers 99: at most 9"]);
    let lan = format!("{}", bare.lab.subnet().net());
    fails(&["up", "--name", "w", "--bare", "--subnet", &lan], &["--subnet", "overlaps with", "leave --subnet out"]);
    fails(&["up", "--name", "w", "--bare", "--subnet", "10.244.0.0/24"], &["overlaps with 10.244.0.0/16"]);
    fails(&["up", "--name", "w", "--bare", "--dir", "/dev/shm/../../proc/labs"], &["--dir"]);
    fails(&["up", "--name", "w", "--bare", "--dir", "labs"], &["--dir labs: give an absolute path"]);
    fails(&["partition", "s1", "--from", "b1", "--name", "words"], &["no machine \"b1\""]);
    fails(
        &["shell", "s1", "--name", "words", "--", "no-such-program"],
        &["no program \"no-such-program\" on machine s1"],
    );
    let mut missing = std::process::Command::new(seawall());
    missing.args(["lab", "up", "--name", "w", "--dir"]).arg(&labs).env("PATH", "/nonexistent");
    let (success, _, stderr) = outcome(missing);
    assert!(!success && stderr.contains("nft is not on PATH: apt-get install nftables"), "{stderr}");
    assert!(stderr.contains("containerd is not on PATH: apt-get install containerd"), "{stderr}");
    let left: Vec<String> =
        left_of("w", bare.dir.path()).into_iter().filter(|l| l.starts_with("mount") == l.contains(".w.")).collect();
    assert!(left.iter().all(|l| l.ends_with("/labs/w")), "nothing was begun: {left:?}");

    let works = |args: &[&str]| {
        let (success, stdout, stderr) = command(&labs, args);
        assert!(success, "{args:?}: {stderr}");
        stdout
    };
    assert!(works(&["ls"]).contains("words\n"));
    let table = works(&["status", "--name", "words"]);
    assert!(table.contains("MACHINE") && table.lines().any(|l| l.starts_with("a1") && l.contains(" on ")), "{table}");
    works(&["freeze", "a1", "--name", "words"]);
    works(&["partition", "s1", "--name", "words", "--one-way", "out"]);
    works(&["loss", "2.5", "--name", "words"]);
    let json: serde_json::Value = serde_json::from_str(&works(&["status", "--name", "words", "-o", "json"])).unwrap();
    assert_eq!((&json["machines"][0]["power"], &json["machines"][1]["power"]), (&"on".into(), &"frozen".into()));
    assert_eq!((&json["loss"], json["cuts"].as_array().unwrap().len()), (&2.5.into(), 2));
    let (_, _, stderr) = command(&labs, &["shell", "a1", "--name", "words", "--", "true"]);
    assert!(stderr.contains("machine a1 is frozen: nothing can be run there"), "{stderr}");
    works(&["thaw", "a1", "--name", "words"]);
    works(&["heal", "--name", "words"]);
    assert_eq!(works(&["shell", "a1", "--name", "words", "--", "hostname"]), "a1\n");
    let mut shell = std::process::Command::new(seawall());
    shell.args(["lab", "shell", "s1", "--name", "words", "--dir"]).arg(&labs).args(["--", "sh", "-c", "cat; exit 7"]);
    let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    shell.stdin.take().unwrap().write_all(b"through stdin").unwrap();
    let output = shell.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(7), &b"through stdin"[..]));
    // What was started on a machine ends with who started it.
    let s1 = bare.machine("s1");
    let sleeper = s1.command("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
    let sleeps = || {
        s1.processes()
            .unwrap()
            .iter()
            .any(|p| fs::read_to_string(format!("/proc/{p}/comm")).is_ok_and(|c| c == "sleep\n"))
    };
    until("it sleeps", async || sleeps().then_some(())).await;
    drop(sleeper);
    until("it has ended", async || (!sleeps()).then_some(())).await;
    works(&["power-off", "s1", "a1", "--name", "words", "--wipe"]);
    works(&["power-on", "s1", "a1", "--name", "words"]);
    works(&["reboot", "a1", "--name", "words"]);
    works(&["down", "--name", "words"]);
    let (success, _, stderr) = command(&labs, &["down", "--name", "words"]);
    assert!(success && stderr.contains("there is no lab words"), "{stderr}");
    assert_eq!(left_of("words", bare.dir.path()), [] as [&str; 0]);
}
