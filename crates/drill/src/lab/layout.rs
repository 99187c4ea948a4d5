//! Names, addresses and places: everything about a lab that is decided before anything is made. Pure.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// Begins the name of everything that a lab makes outside of its directory: cgroups and network namespaces.
pub const PREFIX: &str = "seawall-lab.";
/// Begins the name of a lab's link on the host.
pub const LINK_PREFIX: &str = "swl-";
/// The name under which partitions know the host.
pub const HOST: &str = "host";

/// An interface's name has at most 15 characters, and the lab's own begins with [`LINK_PREFIX`].
const NAME_MAX: usize = 11;
/// What clusters use for pods and Services unless told otherwise.
const RESERVED: [(Ipv4Addr, u8); 2] = [(Ipv4Addr::new(10, 244, 0, 0), 16), (Ipv4Addr::new(10, 96, 0, 0), 16)];

/// What a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs `seawall server`.
    Server,
    /// Runs `seawall agent`.
    Agent,
}

impl Role {
    /// The word for it on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Role::Server => "server",
            Role::Agent => "agent",
        }
    }

    /// The name of the `number`th machine of this role, counted from 1.
    pub fn machine(self, number: u8) -> String {
        match self {
            Role::Server => format!("s{number}"),
            Role::Agent => format!("a{number}"),
        }
    }

    fn first_host(self) -> u32 {
        match self {
            Role::Server => 10,
            Role::Agent => 100,
        }
    }

    fn most(self) -> u8 {
        match self {
            Role::Server => 9,
            Role::Agent => 99,
        }
    }
}

/// A machine of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Its name: host name, node name, and port on the LAN's bridge.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its address on the LAN.
    pub address: Ipv4Addr,
    /// Its address of IPv6, in a lab of both families.
    #[serde(default)]
    pub address6: Option<Ipv6Addr>,
}

impl Spec {
    /// The hardware address. It follows from the IP address, so that a machine keeps it when it boots again, as real
    /// ones do, and no neighbour has a stale entry.
    pub fn mac(&self) -> String {
        let [a, b, c, d] = self.address.octets();
        format!("02:5e:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
    }
}

/// Where a lab's LAN is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Subnet(Ipv4Net);

impl Subnet {
    /// Takes a subnet that somebody chose, if it collides with nothing.
    pub fn given(subnet: Ipv4Net, used: &[Ipv4Net]) -> Result<Subnet> {
        let refuse = |why: String| Error::Invalid { what: format!("--subnet {subnet}"), why };
        if subnet.prefix_len() > 24 || subnet.prefix_len() < 16 {
            return Err(refuse("a lab's LAN has a prefix of /16 to /24: give one such as 10.77.0.0/24".into()));
        }
        if let Some(other) = reserved().chain(used.iter().copied()).find(|o| overlap(&subnet, o)) {
            return Err(refuse(format!(
                "it overlaps with {other}, which this host or the cluster's pods and Services use: choose another, or leave --subnet out"
            )));
        }
        Ok(Subnet(subnet.trunc()))
    }

    /// Finds a subnet that collides with nothing.
    pub fn choose(used: &[Ipv4Net]) -> Result<Subnet> {
        let candidates = (77..=95).chain(16..=76).flat_map(|x| (0..=255).map(move |y| Ipv4Addr::new(10, x, y, 0)));
        let nets = candidates.filter_map(|a| Ipv4Net::new(a, 24).ok());
        let free = nets.into_iter().find(|n| !reserved().chain(used.iter().copied()).any(|o| overlap(n, &o)));
        free.map(Subnet).ok_or_else(|| Error::Invalid {
            what: "--subnet".into(),
            why: "no free /24 was found in 10.0.0.0/8: give one that this host does not route".into(),
        })
    }

    /// The network itself.
    pub fn net(self) -> Ipv4Net {
        self.0
    }

    /// The host's address on the LAN.
    pub fn host(self) -> Ipv4Addr {
        self.nth(1)
    }

    /// The machines' default gateway. It forwards nothing: what has nowhere to go is refused at once.
    pub fn gateway(self) -> Ipv4Addr {
        self.nth(254)
    }

    /// An address with the prefix's length, as `ip address add` wants it.
    pub fn with_prefix(self, address: Ipv4Addr) -> String {
        format!("{address}/{}", self.0.prefix_len())
    }

    fn nth(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.0.network()) + n)
    }

    /// Its network of IPv6, which follows from that of IPv4 (unique local addresses, RFC 4193).
    pub fn net6(self) -> Ipv6Net {
        Ipv6Net::new(self.six(self.0.network()), 64).unwrap_or_default().trunc()
    }

    /// What an address of it is in IPv6.
    pub fn six(self, address: Ipv4Addr) -> Ipv6Addr {
        let [a, b, c, d] = self.0.network().octets().map(u16::from);
        let host = u32::from(address) - u32::from(self.0.network());
        Ipv6Addr::new(0xfd5e, 0, a << 8 | b, c << 8 | d, 0, 0, (host >> 16) as u16, host as u16)
    }

    /// The machine with this role and number.
    pub fn machine(self, role: Role, number: u8, dual: bool) -> Spec {
        let address = self.nth(role.first_host() + u32::from(number));
        Spec { name: role.machine(number), role, address, address6: dual.then(|| self.six(address)) }
    }
}

fn reserved() -> impl Iterator<Item = Ipv4Net> {
    RESERVED.into_iter().filter_map(|(address, prefix)| Ipv4Net::new(address, prefix).ok())
}

fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

/// The machines of a lab, spread over its networks.
pub fn machines(subnets: &[Subnet], servers: u8, agents: u8, dual: bool) -> Result<Vec<Spec>> {
    for (role, count) in [(Role::Server, servers), (Role::Agent, agents)] {
        if count > role.most() {
            return Err(Error::Invalid {
                what: format!("--{}s {count}", role.word()),
                why: format!("at most {} fit a lab's addresses", role.most()),
            });
        }
    }
    if servers == 0 && agents == 0 {
        return Err(Error::Invalid {
            what: "--servers 0 --agents 0".into(),
            why: "a lab has a machine at least".into(),
        });
    }
    let all = (1..=servers).map(|n| (Role::Server, n)).chain((1..=agents).map(|n| (Role::Agent, n)));
    let subnet = |n: u8| subnets.iter().cycle().nth(usize::from(n) - 1);
    Ok(all.filter_map(|(role, n)| Some(subnet(n)?.machine(role, n, dual))).collect())
}

/// A lab's name and directory, and the names that follow from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The lab's name.
    pub lab: String,
    /// Where all labs are.
    pub labs: PathBuf,
}

impl Place {
    /// Checks the name: it becomes part of names of interfaces, cgroups and namespaces.
    pub fn new(lab: &str, labs: &Path) -> Result<Place> {
        let refuse = |why: &str| Err(Error::Invalid { what: format!("--name {lab:?}"), why: why.into() });
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if lab.is_empty() || lab.len() > NAME_MAX {
            return refuse("a lab's name has 1 to 11 characters");
        }
        if !lab.chars().all(fits) || lab.starts_with('-') || lab.ends_with('-') {
            return refuse("a lab's name consists of a-z, 0-9 and - (not at its ends)");
        }
        if !labs.is_absolute() {
            return Err(Error::Invalid {
                what: format!("--dir {}", labs.display()),
                why: "give an absolute path: the lab outlives this command's working directory".into(),
            });
        }
        Ok(Place { lab: lab.into(), labs: labs.into() })
    }

    /// The lab's directory.
    pub fn dir(&self) -> PathBuf {
        self.labs.join(&self.lab)
    }

    /// What is remembered of the lab.
    pub fn state_file(&self) -> PathBuf {
        self.dir().join("lab.json")
    }

    /// The lock of the lab.
    pub fn lock_file(&self) -> PathBuf {
        self.dir().join("lock")
    }

    /// The administrator's kubeconfig, for use on the host.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir().join("kubeconfig")
    }

    /// The directory of a machine.
    pub fn machine(&self, machine: &str) -> MachinePlace {
        MachinePlace { dir: self.dir().join("machines").join(machine) }
    }

    /// What every group and namespace of this lab begins with. Names of labs have no dots, so no lab's prefix is the
    /// beginning of another's.
    pub fn prefix(&self) -> String {
        format!("{PREFIX}{}.", self.lab)
    }

    /// The name of a machine's cgroup and network namespace.
    pub fn of_machine(&self, machine: &str) -> String {
        format!("{}{machine}", self.prefix())
    }

    /// The network namespace of the LAN.
    pub fn lan(&self) -> String {
        self.of_machine("lan")
    }

    /// The host's link into the LAN.
    pub fn host_link(&self) -> String {
        format!("{LINK_PREFIX}{}", self.lab)
    }
}

/// A machine's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachinePlace {
    /// The top of it.
    pub dir: PathBuf,
}

impl MachinePlace {
    /// What survives a power cut.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// What the machine's first process is told, and what it tells.
    pub fn conf(&self) -> PathBuf {
        self.dir.join("conf")
    }

    /// What all machines of the lab see: a storage that no power cut of one of them takes away.
    pub fn shared(&self) -> PathBuf {
        self.dir.ancestors().nth(2).unwrap_or(&self.dir).join("shared")
    }

    /// Where the machine's root is put together.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// How to boot.
    pub fn boot_file(&self) -> PathBuf {
        self.dir.join("boot.json")
    }

    /// The running boot.
    pub fn running_file(&self) -> PathBuf {
        self.dir.join("running.json")
    }

    /// The lock of the machine.
    pub fn lock_file(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// The log of the machine's first process.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// The log of its service.
    pub fn service_log(&self) -> PathBuf {
        self.dir.join("seawall.log")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn names() {
        let check = |name: &str, expect: Option<&str>| {
            let said = Place::new(name, Path::new("/labs")).err().map(|e| e.to_string());
            match expect {
                None => assert_eq!(said, None, "{name}"),
                Some(part) => assert!(said.as_deref().unwrap_or("").contains(part), "{name}: {said:?}"),
            }
        };
        check("seawall", None);
        check("a-b", None);
        check("12345678901", None);
        check("123456789012", Some("1 to 11 characters"));
        check("", Some("1 to 11 characters"));
        check("a.b", Some("a-z, 0-9 and -"));
        check("-a", Some("not at its ends"));
        check("../a", Some("a-z, 0-9 and -"));
        check("A", Some("a-z, 0-9 and -"));
        assert!(Place::new("a", Path::new("labs")).unwrap_err().to_string().contains("absolute"));
    }

    #[test]
    fn no_prefix_is_the_beginning_of_another_labs_names() {
        let (a, ab) = (Place::new("a", Path::new("/l")).unwrap(), Place::new("a-b", Path::new("/l")).unwrap());
        assert!(!ab.of_machine("s1").starts_with(&a.prefix()));
        assert!(a.of_machine("s1").starts_with(&a.prefix()));
        assert!(Place::new("12345678901", Path::new("/l")).unwrap().host_link().len() <= 15);
    }

    #[test]
    fn subnets() {
        assert_eq!(Subnet::choose(&[]).unwrap().net(), net("10.77.0.0/24"));
        assert_eq!(Subnet::choose(&[net("10.77.0.0/23")]).unwrap().net(), net("10.77.2.0/24"));
        assert_eq!(Subnet::choose(&[net("10.64.0.0/10")]).unwrap().net(), net("10.16.0.0/24"));
        assert!(Subnet::choose(&[net("10.0.0.0/8")]).unwrap_err().to_string().contains("no free /24"));
        let check = |subnet: &str, used: &[Ipv4Net], part: &str| {
            let said = Subnet::given(net(subnet), used).map(|s| s.net().to_string()).unwrap_or_else(|e| e.to_string());
            assert!(said.contains(part), "{said}");
        };
        check("10.5.0.0/24", &[], "10.5.0.0/24");
        check("10.5.0.9/24", &[], "10.5.0.0/24");
        check("10.244.3.0/24", &[], "overlaps with 10.244.0.0/16");
        check("10.96.0.0/16", &[], "overlaps with 10.96.0.0/16");
        check("192.168.7.0/24", &[net("192.168.0.0/16")], "overlaps with 192.168.0.0/16");
        check("10.5.0.0/25", &[], "/16 to /24");
    }

    #[test]
    fn addresses() {
        let subnet = Subnet::given(net("10.5.0.0/24"), &[]).unwrap();
        let all = machines(&[subnet], 3, 2, false).unwrap();
        let text: Vec<String> = all.iter().map(|m| format!("{} {}", m.name, m.address)).collect();
        assert_eq!(text, ["s1 10.5.0.11", "s2 10.5.0.12", "s3 10.5.0.13", "a1 10.5.0.101", "a2 10.5.0.102"]);
        assert_eq!(all[0].mac(), "02:5e:0a:05:00:0b");
        assert_eq!((subnet.host(), subnet.gateway()), (Ipv4Addr::new(10, 5, 0, 1), Ipv4Addr::new(10, 5, 0, 254)));
        assert!(machines(&[subnet], 10, 0, false).unwrap_err().to_string().contains("--servers 10"));
        assert!(machines(&[subnet], 0, 0, false).unwrap_err().to_string().contains("a machine at least"));
        let most = machines(&[subnet], 9, 99, false).unwrap();
        let mut seen: Vec<Ipv4Addr> = most.iter().map(|m| m.address).chain([subnet.host(), subnet.gateway()]).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), most.len() + 2, "no address twice");
        // Two networks, two families.
        let other = Subnet::given(net("10.6.0.0/24"), &[]).unwrap();
        let text: Vec<String> = machines(&[subnet, other], 1, 3, true)
            .unwrap()
            .iter()
            .map(|m| format!("{} {} {}", m.name, m.address, m.address6.unwrap()))
            .collect();
        let expect = [
            "s1 10.5.0.11 fd5e:0:a05::b",
            "a1 10.5.0.101 fd5e:0:a05::65",
            "a2 10.6.0.102 fd5e:0:a06::66",
            "a3 10.5.0.103 fd5e:0:a05::67",
        ];
        assert_eq!(text, expect);
        assert_eq!(other.net6(), "fd5e:0:a06::/64".parse().unwrap());
    }
}
