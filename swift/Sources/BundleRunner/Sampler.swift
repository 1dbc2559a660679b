// Choosing the next token from a row of logits.
// Not yet run: no Apple device was at hand.

import Foundation

/// How tokens are chosen: greedily at temperature 0, else from a nucleus (arXiv 1904.09751).
public struct Sampling: Encodable {
  public var temperature: Double
  public var topP: Double
  public var seed: UInt64

  public init(temperature: Double = 0, topP: Double = 1, seed: UInt64 = 0) {
    (self.temperature, self.topP, self.seed) = (temperature, topP, seed)
  }
}

struct Sampler {
  private let sampling: Sampling
  private var state: UInt64

  init(_ sampling: Sampling) {
    self.sampling = sampling
    state = sampling.seed
  }

  mutating func choose(_ logits: [Float]) throws -> Int64 {
    guard let largest = logits.max(), largest.isFinite, !logits.contains(where: \.isNaN) else {
      throw RunnerError.damaged("its logits, which are no numbers")
    }
    if sampling.temperature == 0 { return Int64(logits.firstIndex(of: largest)!) }
    let order = logits.indices.sorted { logits[$0] > logits[$1] }
    // The largest at zero, so that no temperature is too small to divide by.
    let shares = order.map { exp(Double(logits[$0] - largest) / sampling.temperature) }
    let bound = sampling.topP * shares.reduce(0, +)
    var nucleus = 0.0
    var kept = 0
    // The token that crosses the threshold still belongs to the nucleus.
    while kept < shares.count, nucleus < bound {
      nucleus += shares[kept]
      kept += 1
    }
    var left = uniform() * nucleus
    var drawn = 0
    while drawn + 1 < kept, left >= shares[drawn] {
      left -= shares[drawn]
      drawn += 1
    }
    return Int64(order[drawn])
  }

  /// A number from 0 to 1, by SplitMix64.
  private mutating func uniform() -> Double {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
    mixed ^= mixed >> 31
    return Double(mixed >> 11) * 0x1p-53
  }
}
