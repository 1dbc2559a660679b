// A bundle on ExecuTorch's Module: tokens in, tokens out, fed by the program's own lengths.
// Not yet run: no Apple device was at hand.

import ExecuTorch
import Foundation

/// A causal LM with a cache, fed in chunks of the program's enumerated lengths: nothing is padded,
/// so that a prompt takes as many calls as it has parts.
///
/// One sequence at a time, from one thread at a time.
public final class ModuleRunner {
  private let module: Module
  private let manifest: Manifest
  /// Of the next token.
  public private(set) var position = 0

  public init(_ bundle: LanguageBundle) {
    manifest = bundle.manifest
    module = Module(filePath: bundle.program.path)
  }

  /// Loads the program; on Core ML it is compiled for the device then, the first time.
  public func load() throws {
    try module.load(manifest.method.name)
  }

  /// Begins a new sequence. The cache stays as it is: a program masks every position at and behind
  /// the one that it writes next, so that nothing of it is seen before it is written over.
  public func reset() {
    position = 0
  }

  /// Continues the sequence by `tokens`, and returns the last row of logits.
  public func feed(_ tokens: [Int64]) throws -> [Float] {
    guard !tokens.isEmpty else { throw RunnerError.emptyPrompt }
    guard position + tokens.count <= manifest.context else {
      throw RunnerError.tooLong(tokens: position + tokens.count, context: manifest.context)
    }
    if let wrong = tokens.first(where: { $0 < 0 || $0 >= Int64(manifest.vocabulary) }) {
      throw RunnerError.unknownToken(wrong)
    }
    var row: [Float] = []
    var start = 0
    for length in Self.split(tokens.count, by: manifest.method.lengths, ranged: manifest.ranged) {
      row = try step(Array(tokens[start..<start + length]))
      start += length
    }
    return row
  }

  /// Reads `prompt` from a reset, and adds tokens until `onToken` gives false, a stop token, the
  /// count or a full context.
  ///
  /// - Returns: The new tokens, and why they ended: `stop`, `length` or `context`.
  public func generate(
    _ prompt: [Int64], count: Int, sampling: Sampling = Sampling(),
    onToken: (Int64) -> Bool = { _ in true }
  ) throws -> (tokens: [Int64], finish: String) {
    reset()
    var sampler = Sampler(sampling)
    var made: [Int64] = []
    var token = try sampler.choose(feed(prompt))
    while !manifest.stopTokens.contains(token) {
      made.append(token)
      if !onToken(token) || made.count >= count { return (made, "length") }
      if position == manifest.context { return (made, "context") }
      token = try sampler.choose(feed([token]))
    }
    return (made, "stop")
  }

  /// Writes `count` as a sum of `lengths`, the largest first; of a range, what is left is one more.
  static func split(_ count: Int, by lengths: [Int], ranged: Bool) -> [Int] {
    var left = count
    let used = ranged ? [lengths.max()!] : lengths.sorted(by: >)
    let parts = used.flatMap { length -> [Int] in
      let times = left / length
      left %= length
      return Array(repeating: length, count: times)
    }
    return left > 0 ? parts + [left] : parts
  }

  private func step(_ tokens: [Int64]) throws -> [Float] {
    let chunk = Tensor<Int64>(tokens, shape: [1, tokens.count])
    let start = Tensor<Int64>([Int64(position)], shape: [1])
    let outputs: [Value] = try module.execute(manifest.method.name, [chunk, start])
    guard let first = outputs.first, let logits: Tensor<Float> = first.tensor() else {
      throw RunnerError.damaged("its output, which is no float32 tensor")
    }
    guard logits.shape.last == manifest.vocabulary else {
      throw RunnerError.damaged("the width of its logits")
    }
    position += tokens.count
    return Array(logits.scalars().suffix(manifest.vocabulary))
  }
}
