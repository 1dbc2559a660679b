// What a run found, as the JSON that `llm-coreml eval --import` takes.
// Not yet run: no Apple device was at hand.

import Foundation

/// Times and memory of a prompt and the tokens after it, medians over the runs.
public struct Report: Encodable {
  let version = 1
  let runner = "swift"
  let executorch = "1.5.1"  // as in Package.swift
  let system: String
  let backend: String
  let programSha256: String
  let sampling: Sampling
  let promptIds: [Int64]
  let ids: [Int64]
  let finish: String
  let runs: Int
  let runsAgree: Bool
  let loadSeconds: Double
  let timeToFirstTokenSeconds: Double
  let tokensPerSecond: Double?
  let peakMemoryBytes: Int

  /// Generates `runs` times after `warmUp` times that are not timed, from a reset each time.
  public static func measure(
    _ bundle: LanguageBundle, prompt: [Int64], count: Int, sampling: Sampling = Sampling(),
    runs: Int = 3, warmUp: Int = 1
  ) throws -> Report {
    let model = ModuleRunner(bundle)
    let load = try seconds { try model.load() }
    for _ in 0..<warmUp { _ = try model.generate(prompt, count: count, sampling: sampling) }
    var made: [(tokens: [Int64], finish: String)] = []
    var first: [Double] = []
    var speed: [Double] = []
    for _ in 0..<max(1, runs) {
      let start = DispatchTime.now()
      var begun: DispatchTime?
      let result = try model.generate(prompt, count: count, sampling: sampling) { _ in
        begun = begun ?? DispatchTime.now()
        return true
      }
      let ended = DispatchTime.now()
      first.append(seconds(from: start, to: begun ?? ended))
      let decoded = result.tokens.count - (result.finish == "stop" ? 0 : 1)
      if let begun, decoded > 0 { speed.append(Double(decoded) / seconds(from: begun, to: ended)) }
      made.append(result)
    }
    return Report(
      system: systemName(), backend: bundle.manifest.target.backend,
      programSha256: bundle.manifest.program.sha256, sampling: sampling, promptIds: prompt,
      ids: made[0].tokens, finish: made[0].finish, runs: made.count,
      runsAgree: made.allSatisfy { $0.tokens == made[0].tokens }, loadSeconds: load,
      timeToFirstTokenSeconds: median(first)!, tokensPerSecond: median(speed),
      peakMemoryBytes: peakMemoryBytes())
  }

  /// The JSON text.
  public func json() throws -> Data {
    let encoder = JSONEncoder()
    encoder.keyEncodingStrategy = .convertToSnakeCase
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
    return try encoder.encode(self)
  }
}

private func seconds(_ work: () throws -> Void) rethrows -> Double {
  let start = DispatchTime.now()
  try work()
  return seconds(from: start, to: .now())
}

private func seconds(from start: DispatchTime, to end: DispatchTime) -> Double {
  Double(end.uptimeNanoseconds - start.uptimeNanoseconds) * 1e-9
}

private func median(_ values: [Double]) -> Double? {
  guard !values.isEmpty else { return nil }
  let sorted = values.sorted()
  let half = sorted.count / 2
  return sorted.count % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2
}

private func systemName() -> String {
  #if os(macOS)
    let name = "macOS"
  #else
    let name = "iOS"
  #endif
  var names = utsname()
  uname(&names)
  let machine = withUnsafeBytes(of: &names.machine) { bytes in
    String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
  }
  return "\(name) \(ProcessInfo.processInfo.operatingSystemVersionString) \(machine)"
}

/// The most memory that this process had, mapped files included.
private func peakMemoryBytes() -> Int {
  var usage = rusage()
  getrusage(RUSAGE_SELF, &usage)
  return usage.ru_maxrss
}
