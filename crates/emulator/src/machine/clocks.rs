//! What happened before what: a vector clock for each warp.
//!
//! A warp's own component counts its releases (barrier arrivals); an access carries the component and its count at that
//! time, and is ordered before whatever a warp does that has seen a count at least as large. Asynchronous readers and
//! writers of shared memory (`wgmma`, bulk copies) have components of their own, which a warp sees once it has waited.

/// Counts of every component.
type Counts = Vec<u32>;

/// What a release passes on to those who acquire it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stamp {
    seen: Counts,
    fenced: Counts,
}

impl Stamp {
    /// Adds one component's count: a bulk copy that completed.
    pub fn add(&mut self, component: usize, count: u32) {
        raise(&mut self.seen, component, count);
    }

    pub fn join(&mut self, other: &Stamp) {
        join(&mut self.seen, &other.seen);
        join(&mut self.fenced, &other.fenced);
    }

    pub fn clear(&mut self) {
        self.seen.clear();
        self.fenced.clear();
    }
}

/// The clocks of a block.
#[derive(Debug, Default)]
pub(crate) struct Clocks {
    /// Warps, which are the first components.
    pub warps: usize,
    groups: usize,
    /// What each warp has seen of everybody.
    seen: Vec<Counts>,
    /// Up to where each warp knows everybody's stores to be fenced for the asynchronous proxy.
    fenced: Vec<Counts>,
    /// Lanes that stored to shared memory since their last proxy fence.
    unfenced: Vec<u32>,
    /// Counts of the asynchronous components.
    ticks: Counts,
}

impl Clocks {
    pub fn new(warps: usize) -> Clocks {
        let groups = warps.div_ceil(4);
        let seen = (0..warps)
            .map(|warp| {
                let mut counts = vec![0; warps + groups];
                if let Some(own) = counts.get_mut(warp) {
                    *own = 1;
                }
                counts
            })
            .collect();
        Clocks {
            warps,
            groups,
            seen,
            fenced: vec![vec![0; warps]; warps],
            unfenced: vec![0; warps],
            ticks: Vec::new(),
        }
    }

    /// Components that can read shared memory: warps, and `wgmma` of each warpgroup.
    pub fn readers(&self) -> usize {
        self.warps + self.groups
    }

    pub fn wgmma_component(&self, warp: usize) -> usize {
        self.warps + warp / 4
    }

    /// The component of the copies that complete at the `mbarrier` of this index.
    pub fn mbarrier_component(&self, index: usize) -> usize {
        self.readers() + index
    }

    /// A new count of an asynchronous component.
    pub fn tick(&mut self, component: usize) -> u32 {
        let count = self.ticks.get(component).copied().unwrap_or(0) + 1;
        raise(&mut self.ticks, component, count);
        count
    }

    /// The warp's own count.
    pub fn own(&self, warp: usize) -> u32 {
        self.seen[warp][warp]
    }

    /// What a warp has seen of each component.
    pub fn seen_by(&self, warp: usize) -> &[u32] {
        self.seen.get(warp).map_or(&[], |seen| seen.as_slice())
    }

    pub fn has_seen(&self, warp: usize, component: usize, count: u32) -> bool {
        component == warp || self.seen[warp].get(component).is_some_and(|&seen| seen >= count)
    }

    pub fn knows_fenced(&self, warp: usize, component: usize, count: u32) -> bool {
        component >= self.warps || self.fenced[warp].get(component).is_some_and(|&seen| seen >= count)
    }

    /// Marks that a warp has waited for an asynchronous component.
    pub fn saw(&mut self, warp: usize, component: usize, count: u32) {
        raise(&mut self.seen[warp], component, count);
    }

    /// Lanes stored to shared memory.
    pub fn stored(&mut self, warp: usize, lanes: u32) {
        self.unfenced[warp] |= lanes;
    }

    /// Lanes executed a proxy fence. Only when every lane that stored has done so are the warp's stores fenced.
    pub fn fence(&mut self, warp: usize, lanes: u32) {
        self.unfenced[warp] &= !lanes;
        if self.unfenced[warp] == 0 {
            self.fenced[warp][warp] = self.seen[warp][warp];
            self.seen[warp][warp] += 1;
        }
    }

    pub fn release(&mut self, warp: usize, stamp: &mut Stamp) {
        join(&mut stamp.seen, &self.seen[warp]);
        join(&mut stamp.fenced, &self.fenced[warp]);
        self.seen[warp][warp] += 1;
    }

    pub fn acquire(&mut self, warp: usize, stamp: &Stamp) {
        join(&mut self.seen[warp], &stamp.seen);
        join(&mut self.fenced[warp], &stamp.fenced);
    }
}

fn join(into: &mut Counts, from: &[u32]) {
    if into.len() < from.len() {
        into.resize(from.len(), 0);
    }
    for (a, &b) in into.iter_mut().zip(from) {
        *a = (*a).max(b);
    }
}

fn raise(counts: &mut Counts, component: usize, count: u32) {
    if counts.len() <= component {
        counts.resize(component + 1, 0);
    }
    if let Some(place) = counts.get_mut(component) {
        *place = (*place).max(count);
    }
}
