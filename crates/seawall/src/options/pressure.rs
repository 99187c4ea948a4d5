//! The flags of what pods may have of a machine.

use std::time::Duration;

use super::duration;

/// What pods may have of a machine, and what is done when it becomes too little, by upstream's names
/// (<https://kubernetes.io/docs/concepts/scheduling-eviction/node-pressure-eviction/>).
#[derive(clap::Args, Clone)]
pub struct PressureOptions {
    /// When the Node says that it is short of memory, disk or process numbers, so that no pods are placed on it and those that
    /// use most have to go: SIGNAL<AMOUNT or SIGNAL<PERCENT%, separated by commas. A signal that is not named has no
    /// threshold.
    #[arg(long, default_value = seawall_node::pressure::DEFAULT, value_name = "SIGNAL<AMOUNT,...", overrides_with = "eviction_hard")]
    eviction_hard: seawall_node::pressure::Thresholds,
    /// The same, where pods go only after a grace period and in their own time.
    #[arg(long, default_value = "", value_name = "SIGNAL<AMOUNT,...", hide_default_value = true)]
    eviction_soft: seawall_node::pressure::Thresholds,
    /// For how long each soft threshold has to be passed before pods go: SIGNAL=TIME, e.g. memory.available=1m30s.
    #[arg(long, default_value = "", value_name = "SIGNAL=TIME,...", hide_default_value = true)]
    eviction_soft_grace_period: seawall_node::pressure::Grace,
    /// How many seconds a pod has to end at most when a soft threshold was passed.
    #[arg(long, default_value_t = 0, value_name = "SECONDS")]
    eviction_max_pod_grace_period: u32,
    /// How much more than its threshold must be left before there is enough again: SIGNAL=AMOUNT, e.g. nodefs.available=1Gi.
    #[arg(long, default_value = "", value_name = "SIGNAL=AMOUNT,...", hide_default_value = true)]
    eviction_minimum_reclaim: seawall_node::pressure::Reclaim,
    /// How long the Node still says that it is short of something after it was.
    #[arg(long, default_value = "5m", value_parser = duration, value_name = "DURATION")]
    eviction_pressure_transition_period: Duration,
    /// From how many hundredths of the disk on images are deleted that nobody uses; 100 for never.
    #[arg(long, default_value_t = 85, value_name = "PERCENT", overrides_with = "image_gc_high_threshold")]
    image_gc_high_threshold: u8,
    /// Until how many hundredths of the disk are used.
    #[arg(long, default_value_t = 80, value_name = "PERCENT")]
    image_gc_low_threshold: u8,
    /// How long an image stays at least.
    #[arg(long, default_value = "2m", value_parser = duration, value_name = "DURATION")]
    minimum_image_ttl_duration: Duration,
    /// How many pods this machine takes.
    #[arg(long, default_value_t = 110, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_pods: u32,
    /// What is kept for this program and the container runtime: RESOURCE=QUANTITY of cpu, memory and ephemeral-storage.
    #[arg(long, default_value = "", value_name = "RESOURCE=QUANTITY,...", hide_default_value = true)]
    kube_reserved: seawall_node::reserved::Reserved,
    /// What is kept for everything else on the machine.
    #[arg(long, default_value = "", value_name = "RESOURCE=QUANTITY,...", hide_default_value = true)]
    system_reserved: seawall_node::reserved::Reserved,
    /// Who gets CPUs for itself: none, or static for containers of Guaranteed pods that request whole ones. What is reserved of
    /// the CPU is kept for all others, and has to be something with static.
    #[arg(long, default_value_t, value_name = "none|static")]
    pub cpu_manager_policy: seawall_node::cpus::Policy,
    /// Whether what a pod gets for itself (CPUs, devices) comes from NUMA nodes that are near to each other: with best-effort if
    /// that can be had; with restricted a pod is refused if it comes from more nodes than it would have to, with
    /// single-numa-node if it does not come from one.
    #[arg(long, default_value_t, value_name = "none|best-effort|restricted|single-numa-node")]
    topology_manager_policy: seawall_node::topology::settings::Policy,
    /// Whether that is asked of each container, or of all containers of a pod together.
    #[arg(long, default_value_t, value_name = "container|pod")]
    topology_manager_scope: seawall_node::topology::settings::Scope,
    /// prefer-closest-numa-nodes=true: where several NUMA nodes are needed, those that are close to each other.
    /// max-allowable-numa-nodes=NUMBER: how many the machine may have, 8 to 16.
    #[arg(long, default_value = "", value_name = "OPTION=VALUE,...", hide_default_value = true)]
    topology_manager_policy_options: seawall_node::topology::settings::Options,
}

impl Default for PressureOptions {
    fn default() -> PressureOptions {
        PressureOptions {
            eviction_hard: Default::default(),
            eviction_soft: seawall_node::pressure::Thresholds(Default::default()),
            eviction_soft_grace_period: Default::default(),
            eviction_max_pod_grace_period: 0,
            eviction_minimum_reclaim: Default::default(),
            eviction_pressure_transition_period: Duration::from_secs(300),
            image_gc_high_threshold: 85,
            image_gc_low_threshold: 80,
            minimum_image_ttl_duration: Duration::from_secs(120),
            max_pods: 110,
            kube_reserved: Default::default(),
            system_reserved: Default::default(),
            cpu_manager_policy: Default::default(),
            topology_manager_policy: Default::default(),
            topology_manager_scope: Default::default(),
            topology_manager_policy_options: Default::default(),
        }
    }
}

impl PressureOptions {
    /// When pods have to go.
    pub fn eviction(&self) -> seawall_node::eviction::state::Settings {
        seawall_node::eviction::state::Settings {
            hard: self.eviction_hard.clone(),
            soft: self.eviction_soft.clone(),
            grace: self.eviction_soft_grace_period.clone(),
            max_pod_grace: Duration::from_secs(self.eviction_max_pod_grace_period.into()),
            reclaim: self.eviction_minimum_reclaim.clone(),
            transition: self.eviction_pressure_transition_period,
        }
    }

    /// When images are deleted.
    pub fn images(&self) -> seawall_node::eviction::images::Settings {
        seawall_node::eviction::images::Settings {
            high: self.image_gc_high_threshold,
            low: self.image_gc_low_threshold,
            min_age: self.minimum_image_ttl_duration,
        }
    }

    /// What pods may not have.
    pub fn reserved(&self) -> seawall_node::reserved::Reserved {
        self.kube_reserved.clone() + self.system_reserved.clone()
    }

    /// What is to be near to each other.
    pub fn topology(&self) -> seawall_node::topology::settings::Settings {
        seawall_node::topology::settings::Settings {
            policy: self.topology_manager_policy,
            scope: self.topology_manager_scope,
            options: self.topology_manager_policy_options,
        }
    }

    /// # Errors
    /// If two of them contradict one another.
    pub fn check(&self) -> anyhow::Result<()> {
        self.eviction().check()?;
        self.images().check()?;
        seawall_node::cpus::check(self.cpu_manager_policy, self.reserved().cpu())
    }
}
